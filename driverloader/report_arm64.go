package driverloader

import "os"

// reportCPU: there is no flag for the virtualisation extension, which user
// space cannot see; the KVM verdict tells.
func reportCPU() Verdict {
	v := Verdict{Name: "cpu", OK: true}
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		v.OK, v.Detail = false, err.Error()
		return v
	}
	v.Detail = "arm64"
	if cpuFlags(string(b))["atomics"] {
		v.Detail += " with large system extensions"
	}
	return v
}
