package agent

import (
	"slices"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"google.golang.org/grpc/codes"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// What nobody changes is mounted when the first container has it, once.
func TestCachedShare(t *testing.T) {
	f := newFixture(t)
	mounted := func() int {
		f.system.mu.Lock()
		defer f.system.mu.Unlock()
		n := 0
		for _, tag := range f.system.mounted {
			if tag == agentv1.CachedShareTag {
				n++
			}
		}
		return n
	}
	f.create("plain", "true", nil)
	if mounted() != 0 {
		t.Error("it is mounted for a container that has no use for it")
	}
	req := func(id string) *agentv1.CreateContainerRequest {
		r := shellContainer(id, "true", nil)
		r.Mounts = []*agentv1.Mount{{Destination: "/v", ShareTag: agentv1.CachedShareTag, SharePath: id + "/mounts/0"}}
		return r
	}
	f.system.fail = "mount " + agentv1.CachedShareTag
	_, err := f.CreateContainer(f.ctx, req("a"))
	wantCode(t, "create", err, codes.Internal, `mount share "runv-cached"`)
	f.system.fail = ""
	for _, id := range []string{"a", "b"} {
		if _, err := f.CreateContainer(f.ctx, req(id)); err != nil {
			t.Fatal(err)
		}
	}
	if n := mounted(); n != 1 {
		t.Errorf("it is mounted %d times", n)
	}
}

// What several containers have of a share is forgotten with the last of them.
func TestForgetShared(t *testing.T) {
	f := newFixture(t)
	create := func(id string, paths ...string) {
		t.Helper()
		r := shellContainer(id, "true", nil)
		r.Rootfs = &agentv1.Rootfs{ShareTag: agentv1.ShareTag, SharePath: id + "/rootfs"}
		for _, p := range paths {
			r.Mounts = append(r.Mounts, &agentv1.Mount{Destination: "/v", ShareTag: agentv1.ShareTag, SharePath: p})
		}
		r.Mounts = append(r.Mounts, &agentv1.Mount{Destination: "/d", ShareTag: agentv1.DiskTag, SharePath: "serial"})
		if _, err := f.CreateContainer(f.ctx, r); err != nil {
			t.Fatal(err)
		}
	}
	remove := func(id string, want ...string) {
		t.Helper()
		if _, err := f.DeleteContainer(f.ctx, &agentv1.DeleteContainerRequest{ContainerId: id}); err != nil {
			t.Fatal(err)
		}
		f.system.mu.Lock()
		defer f.system.mu.Unlock()
		if !slices.Equal(f.system.forgotten, want) {
			t.Errorf("with %s went %q, want %q", id, f.system.forgotten, want)
		}
		f.system.forgotten = nil
	}
	create("a", "@0/v", "@1/w", "@0/v")
	create("b", "@0/v")
	create("c", "@1/w", "@10/x")
	remove("a", "a")
	create("a", "@0/v")
	remove("b", "b")
	remove("c", "c", "@1", "@10")
	remove("a", "a", "@0")

	// Nor by a container that cannot be made.
	create("a", "@2/v")
	f.system.fail = "disks"
	r := shellContainer("b", "true", nil)
	r.Mounts = []*agentv1.Mount{{Destination: "/v", ShareTag: agentv1.ShareTag, SharePath: "@2/v"}, {Destination: "/w", ShareTag: agentv1.ShareTag, SharePath: "@3/w"}}
	r.Disks = []*agentv1.Disk{{Serial: "x"}}
	_, err := f.CreateContainer(f.ctx, r)
	wantCode(t, "create", err, codes.Internal, "fake failure")
	f.system.fail = ""
	remove("a", "@3", "a", "@2")
}

func TestSharedMounts(t *testing.T) {
	const table = `22 1 0:20 / /proc rw - proc proc rw
30 1 0:30 / /run/runv/share/runv rw shared:1 - virtiofs runv rw
31 30 0:31 / /run/runv/share/runv/a/rootfs rw shared:2 - virtiofs runv rw
32 31 0:32 / /run/runv/share/runv/a/rootfs/var\040lib/x\134y rw - virtiofs runv rw
33 30 0:33 / /run/runv/share/runv/ab/rootfs rw - virtiofs runv rw
34 1 0:34 / /run/runv/share/disks/a/root rw - overlay overlay rw
35 1 0:35 / /elsewhere/run/runv/share/runv/a/rootfs rw - ext4 x rw
36 30 0:36 / /run/runv/share/runv/@0/v rw - virtiofs runv rw
37 30 0:37 / /run/runv/share/runv/@01/v rw - virtiofs runv rw
`
	all, err := mountinfo.GetMountsFromReader(strings.NewReader(table), nil)
	if err != nil {
		t.Fatal(err)
	}
	got := sharedMounts(all, []string{"a", "@0"})
	want := []string{
		"/run/runv/share/runv/a/rootfs",
		`/run/runv/share/runv/a/rootfs/var lib/x\y`,
		"/run/runv/share/runv/@0/v",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
