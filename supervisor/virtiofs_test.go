package supervisor

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/factory"
	"github.com/hyperhq/runv/hypervisor"
	"github.com/hyperhq/runv/hypervisor/hvtest"
)

func TestUncloned(t *testing.T) {
	for name, tc := range map[string]struct {
		vm      *supervisorv1.VM
		boots   bool // it is not cloned, though it was to be
		warning bool
		err     string
	}{
		"nothing said":   {vm: &supervisorv1.VM{Template: "/t"}},
		"auto":           {vm: &supervisorv1.VM{Share: "auto", Template: "/t", TemplatePolicy: "required"}},
		"9p":             {vm: &supervisorv1.VM{Share: "9p", Factory: "f"}},
		"virtiofs":       {vm: &supervisorv1.VM{Share: "virtiofs"}},
		"with template":  {vm: &supervisorv1.VM{Share: "virtiofs", Template: "/t", TemplatePolicy: "preferred"}, boots: true, warning: true},
		"with a factory": {vm: &supervisorv1.VM{Share: "virtiofs", Factory: "f"}, boots: true, warning: true},
		"required":       {vm: &supervisorv1.VM{Share: "virtiofs", Template: "/t", TemplatePolicy: "required"}, err: `template-policy is "required"`},
		"unknown":        {vm: &supervisorv1.VM{Share: "nfs"}, err: `vm.share is "nfs", want "auto", "9p" or "virtiofs"`},
	} {
		t.Run(name, func(t *testing.T) {
			vm, warning, err := uncloned("pod", tc.vm)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("error %v, want %q", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if boots := tc.vm.Template+tc.vm.Factory != "" && vm.Template+vm.Factory == ""; boots != tc.boots || vm.Share != tc.vm.Share {
				t.Errorf("it became %v", vm)
			}
			if (warning != "") != tc.warning || tc.warning && !strings.Contains(warning, "vm pod boots: its share is virtiofs") {
				t.Errorf("warning %q", warning)
			}
		})
	}
}

// Which share a VM has, and what is said if virtiofs cannot be had.
func TestStartFileServer(t *testing.T) {
	program := filepath.Join(t.TempDir(), "virtiofsd")
	const script = "#!/bin/sh\ncase $1 in --help) echo --shared-dir;; --version) echo virtiofsd 1;; *) sleep 1000;; esac\n"
	if err := os.WriteFile(program, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		vm     *supervisorv1.VM
		driver string
		serves bool
		err    string
	}{
		"auto, KVM":             {vm: &supervisorv1.VM{Share: "auto", Virtiofsd: program}, driver: "kvm", serves: true},
		"nothing said, KVM":     {vm: &supervisorv1.VM{Virtiofsd: program}, driver: "kvm", serves: true},
		"auto, emulated":        {vm: &supervisorv1.VM{Share: "auto", Virtiofsd: program}, driver: "qemu"},
		"auto, template":        {vm: &supervisorv1.VM{Share: "auto", Virtiofsd: program, Template: "/t"}, driver: "kvm"},
		"auto, factory":         {vm: &supervisorv1.VM{Share: "auto", Virtiofsd: program, Factory: "f"}, driver: "kvm"},
		"auto, none there":      {vm: &supervisorv1.VM{Share: "auto", Virtiofsd: "/x-absent"}, driver: "kvm"},
		"9p, KVM":               {vm: &supervisorv1.VM{Share: "9p", Virtiofsd: program}, driver: "kvm"},
		"virtiofs, emulated":    {vm: &supervisorv1.VM{Share: "virtiofs", Virtiofsd: program}, driver: "qemu", serves: true},
		"virtiofs, none there":  {vm: &supervisorv1.VM{Share: "virtiofs", Virtiofsd: "/x-absent"}, driver: "kvm", err: "virtiofsd not found: /x-absent"},
		"virtiofs, no such dir": {vm: &supervisorv1.VM{Share: "virtiofs", Virtiofsd: program}, driver: "none", err: "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.serves && os.Geteuid() != 0 {
				t.Skip("needs root: makes a pid namespace")
			}
			path := filepath.Join(t.TempDir(), "share")
			if tc.driver == "none" {
				path = "/x-absent/share"
			}
			cfg := hypervisor.Config{Shares: []hypervisor.Share{{Tag: "runv", Path: path}}}
			s, err := startFileServer(t.Context(), tc.vm, tc.driver, &cfg)
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("error %v, want %q", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if (s != nil) != tc.serves || (cfg.Shares[0].Server != nil) != tc.serves {
				t.Errorf("server %v, share %+v", s, cfg.Shares[0])
			}
			if s != nil {
				s.Close()
			}
		})
	}
}

// The guest may keep a container's files if it is asked to, but not with virtiofs,
// and not its root in the place of a container with the same name.
func TestChooseCaching(t *testing.T) {
	s := New(Options{SandboxID: "pod", Dir: t.TempDir()})
	request := func(id, root, volume string) *agentv1.CreateContainerRequest {
		return &agentv1.CreateContainerRequest{
			ContainerId: id, Rootfs: &agentv1.Rootfs{ShareTag: root},
			Mounts: []*agentv1.Mount{{Type: "proc"}, {ShareTag: volume}},
		}
	}
	const fresh, cached, disk = agentv1.ShareTag, agentv1.CachedShareTag, agentv1.DiskTag
	plain, virtio := &machine{}, &machine{files: &stubServer{}}
	for _, tc := range []struct {
		m                              *machine
		id, root, volume, wantR, wantV string
	}{
		{plain, "a", fresh, fresh, fresh, fresh},
		{plain, "a", cached, cached, cached, cached}, // nothing of the first was kept
		{plain, "a", cached, cached, fresh, cached},  // a volume's is known to the share
		{plain, "a", disk, cached, disk, cached},
		{plain, "b", cached, fresh, cached, fresh},
		{virtio, "c", cached, cached, fresh, fresh},
	} {
		req := request(tc.id, tc.root, tc.volume)
		s.chooseCaching(tc.m, req)
		if r, v := req.Rootfs.ShareTag, req.Mounts[1].ShareTag; r != tc.wantR || v != tc.wantV {
			t.Errorf("%s with %q and %q: %q and %q, want %q and %q", tc.id, tc.root, tc.volume, r, v, tc.wantR, tc.wantV)
		}
	}
}

// stubServer is a file server that ends when the test says.
type stubServer struct {
	once    sync.Once
	done    chan struct{}
	text    string
	orderly bool
	closed  bool
}

func (s *stubServer) Pid() int              { return os.Getpid() }
func (s *stubServer) Done() <-chan struct{} { return s.done }
func (s *stubServer) Exit() (string, bool)  { <-s.done; return s.text, s.orderly }
func (s *stubServer) Release()              {}
func (s *stubServer) Close()                { s.closed = true; s.end() }
func (s *stubServer) end()                  { s.once.Do(func() { close(s.done) }) }

// startVM starts a VM of no hypervisor.
func startVM(t *testing.T) (hypervisor.VM, *hvtest.VM) {
	t.Helper()
	dir := t.TempDir()
	for _, f := range []string{"kernel", "initrd"} {
		if err := os.WriteFile(filepath.Join(dir, f), []byte("070701"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d := &hvtest.Driver{}
	cfg := hypervisor.Config{Name: "pod", VCPUs: 1, MemoryMiB: 64, Kernel: filepath.Join(dir, "kernel"), Initrd: filepath.Join(dir, "initrd"), SerialPort: "p"}
	vm, err := factory.Direct(d).GetVM(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return vm, d.VMs()[0]
}

// The end of a file server is the VM's, with the reason that was first: what
// follows from the VM's own end is no reason. Either may be a want of memory.
func TestGuard(t *testing.T) {
	const server = "the file server of the pod's share (virtiofsd) was shot"
	const limit = "the limit of memory of the pod's cgroup on the host was reached, and the host's kernel killed "
	for name, tc := range map[string]struct {
		orderly bool
		vm      *hypervisor.Exit // it ends so, and before the server
		kills   uint64           // for want of memory, in the pod's cgroup
		oom     bool
		want    string
	}{
		"the server crashes":               {want: server},
		"the server leaves":                {orderly: true, want: server},
		"the VM ends, the server leaves":   {orderly: true, vm: &hypervisor.Exit{Code: 1, Stderr: "out of luck"}, kills: 1, want: "the virtual machine exited with code 1: out of luck"},
		"the server has no memory":         {kills: 1, oom: true, want: limit + "the file server; " + server},
		"the VM is killed":                 {orderly: true, vm: &hypervisor.Exit{Signal: 9}, want: "the virtual machine was killed by signal 9"},
		"the VM has no memory":             {orderly: true, vm: &hypervisor.Exit{Signal: 9}, kills: 1, oom: true, want: limit + "the virtual machine; the virtual machine was killed by signal 9"},
		"the VM crashes, others no memory": {orderly: true, vm: &hypervisor.Exit{Signal: 11}, kills: 1, want: "the virtual machine was killed by signal 11"},
	} {
		t.Run(name, func(t *testing.T) {
			vm, fake := startVM(t)
			files := &stubServer{done: make(chan struct{}), text: "was shot", orderly: tc.orderly}
			// Whatever else the host has killed is nothing to this pod.
			m := &machine{vm: vm, files: files, cgroup: &cgroup{group: &fakeGroup{oomKills: tc.kills}}}
			m.guard()
			if tc.vm != nil {
				fake.Crash(*tc.vm)
			}
			files.end()
			<-vm.Done()
			oom, err := m.befell(hypervisor.ErrEnded)
			if status.Code(err) != codes.Unavailable || !strings.HasPrefix(status.Convert(err).Message(), tc.want) || oom != tc.oom {
				t.Errorf("it is explained as %v, for want of memory: %t; want %q, %t", err, oom, tc.want, tc.oom)
			}
			m.close()
			if !files.closed {
				t.Error("the server was not closed")
			}
		})
	}
}

// Who only asks what became of a VM has not counted what the host killed before.
func TestExplainWithoutCount(t *testing.T) {
	vm, fake := startVM(t)
	fake.Crash(hypervisor.Exit{Signal: 9})
	if err := Explain(vm, hypervisor.ErrEnded); !strings.HasPrefix(status.Convert(err).Message(), "the virtual machine was killed by signal 9") {
		t.Errorf("it is explained as %v", err)
	}
}
