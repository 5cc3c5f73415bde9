package seccomp

import "github.com/opencontainers/runtime-spec/specs-go"

// FlagTsync is a flag that the OCI specification does not list and that clients
// write all the same. It asks that all threads of the process get the filter.
const FlagTsync specs.LinuxSeccompFlag = "SECCOMP_FILTER_FLAG_TSYNC"

// Actions lists the names of the actions that Compile accepts, in order.
// SCMP_ACT_NOTIFY is not among them: it needs a program on the host that holds a
// file descriptor of the guest's kernel.
func Actions() []string {
	return []string{
		string(specs.ActAllow), string(specs.ActErrno), string(specs.ActKill), string(specs.ActKillProcess),
		string(specs.ActKillThread), string(specs.ActLog), string(specs.ActTrace), string(specs.ActTrap),
	}
}

// Operators lists the names of the comparisons that Compile accepts, in order.
func Operators() []string {
	return []string{
		string(specs.OpEqualTo), string(specs.OpGreaterEqual), string(specs.OpGreaterThan), string(specs.OpLessEqual),
		string(specs.OpLessThan), string(specs.OpMaskedEqual), string(specs.OpNotEqual),
	}
}

// Flags lists the names of the filter flags that Compile accepts, in order.
func Flags() []string {
	return []string{
		string(specs.LinuxSeccompFlagLog), string(specs.LinuxSeccompFlagSpecAllow), string(FlagTsync),
		string(specs.LinuxSeccompFlagWaitKillableRecv),
	}
}

// Archs lists the names of the architectures that a profile may name, in order.
// Those that the guest's kernel cannot run are accepted and compiled to nothing.
func Archs() []string {
	return []string{
		string(specs.ArchAARCH64), string(specs.ArchARM), string(specs.ArchLOONGARCH64), string(specs.ArchM68K),
		string(specs.ArchMIPS), string(specs.ArchMIPS64), string(specs.ArchMIPS64N32), string(specs.ArchMIPSEL),
		string(specs.ArchMIPSEL64), string(specs.ArchMIPSEL64N32), string(specs.ArchPARISC), string(specs.ArchPARISC64),
		string(specs.ArchPPC), string(specs.ArchPPC64), string(specs.ArchPPC64LE), string(specs.ArchRISCV64),
		string(specs.ArchS390), string(specs.ArchS390X), string(specs.ArchSH), string(specs.ArchSHEB),
		string(specs.ArchX32), string(specs.ArchX86), string(specs.ArchX86_64),
	}
}
