package driverloader

import "os"

// reportCPU looks at the flags without which KVM cannot work.
func reportCPU() Verdict {
	v := Verdict{Name: "cpu"}
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		v.Detail = err.Error()
		return v
	}
	flags := cpuFlags(string(b))
	virt := ""
	for _, f := range []string{"vmx", "svm"} {
		if flags[f] {
			virt = f
		}
	}
	nested := ""
	if flags["hypervisor"] {
		nested = ", itself a virtual machine"
	}
	if virt == "" {
		v.Detail = "no virtualisation flag (vmx or svm)" + nested
		v.Hint = "optional, for KVM: enable virtualisation in the firmware"
		if nested != "" {
			v.Hint = "optional, for KVM: enable nested virtualisation on the host of this machine"
		}
		return v
	}
	v.OK, v.Detail = true, virt+nested
	return v
}
