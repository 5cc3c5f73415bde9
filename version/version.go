// Package version holds what the linker writes into the programs of runv: which
// release they are and which commit they were built from.
//
//	go build -ldflags "-X github.com/hyperhq/runv/version.Version=1.0.0
//	    -X github.com/hyperhq/runv/version.Commit=0123abc"
package version

import "runtime/debug"

// Set by the linker. A build without -ldflags keeps the default of Version and
// takes Commit from what the go command has stamped.
var (
	// Version is the release, or its development version: "0.1.0-dev".
	Version = "0.1.0-dev"
	// Commit is the abbreviated commit hash, followed by "-dirty" if the
	// working tree had changes; empty if unknown.
	Commit = ""
)

// String is Version, with the commit if it is known: "0.1.0 (0123abc)".
func String() string {
	c := Commit
	if c == "" {
		c = stamped()
	}
	if c == "" {
		return Version
	}
	return Version + " (" + c + ")"
}

// stamped returns the commit that the go command recorded, or "".
func stamped() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	var rev, dirty string
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			rev = s.Value[:min(12, len(s.Value))]
		case "vcs.modified":
			if s.Value == "true" {
				dirty = "-dirty"
			}
		}
	}
	if rev == "" {
		return ""
	}
	return rev + dirty
}
