package qemu

const hostArch = "arm64"

// tscKHz is amd64's; other counters tell their rate to the guest.
func tscKHz() uint32 { return 0 }
