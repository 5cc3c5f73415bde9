package agent

import (
	"slices"
	"testing"
)

func TestSharedMounts(t *testing.T) {
	const mountinfo = `22 1 0:20 / /proc rw - proc proc rw
30 1 0:30 / /run/runv/share/runv rw shared:1 - virtiofs runv rw
31 30 0:31 / /run/runv/share/runv/a/rootfs rw shared:2 - virtiofs runv rw
32 31 0:32 / /run/runv/share/runv/a/rootfs/var\040lib/x\134y rw - virtiofs runv rw
33 30 0:33 / /run/runv/share/runv/ab/rootfs rw - virtiofs runv rw
34 1 0:34 / /run/runv/share/disks/a/root rw - overlay overlay rw
35 1 0:35 / /elsewhere/run/runv/share/runv/a/rootfs rw - ext4 x rw
36 30 0:36 / /run/runv/share/runv/a/mounts/0/v rw - virtiofs runv rw
short line
`
	got := sharedMounts([]byte(mountinfo), "a")
	want := []string{
		"/run/runv/share/runv/a/rootfs",
		`/run/runv/share/runv/a/rootfs/var lib/x\y`,
		"/run/runv/share/runv/a/mounts/0/v",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	for in, want := range map[string]string{`\`: `\`, `a\04`: `a\04`, `\999`: `\999`, `\011b`: "\tb"} {
		if got := unescapeMount(in); got != want {
			t.Errorf("unescapeMount(%q) is %q, want %q", in, got, want)
		}
	}
}
