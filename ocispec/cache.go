package ocispec

import (
	"fmt"
	"strings"
)

// cacheOption begins the mount option of a bind mount that says what the guest may
// keep of it: "mmap", only what is mapped, or "loose", all that it has read, which
// is right for a tree that nobody changes.
const cacheOption = "x-runv.cache="

// cacheMode takes cacheOption out of the options that are not flags. Any other
// option of runv's is an error.
func cacheMode(field string, data []string) (loose bool, rest []string, err error) {
	for _, opt := range data {
		mode, ok := strings.CutPrefix(opt, cacheOption)
		switch {
		case !ok && strings.HasPrefix(opt, "x-runv."):
			return false, nil, fmt.Errorf("%s.options: %q is not one of runv's for a bind mount, want %smmap or %sloose", field, clip(opt), cacheOption, cacheOption)
		case !ok:
			rest = append(rest, opt)
		case mode != "mmap" && mode != "loose":
			return false, nil, fmt.Errorf("%s.options: %q names no way to cache, want %smmap or %sloose", field, clip(opt), cacheOption, cacheOption)
		default:
			loose = mode == "loose"
		}
	}
	return loose, rest, nil
}
