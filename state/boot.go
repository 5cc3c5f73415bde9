package state

import (
	"os"
	"strings"
	"sync"
)

// BootID names the time since the machine was booted, random(4): the same for all
// processes until the next boot, in every container. It is read once; empty if
// that fails.
var BootID = sync.OnceValue(func() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
})

// OtherBoot reports whether something that was written at the boot id is of an
// earlier boot than this one: every process that it names is gone, and a ProcessRef
// in it may fit one that it never meant. What has no boot id is of this one.
func OtherBoot(id string) bool {
	return id != "" && BootID() != "" && id != BootID()
}
