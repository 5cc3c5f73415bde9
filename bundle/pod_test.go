package bundle

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hyperhq/runv/client"
	"github.com/hyperhq/runv/state"
)

// fakePods are the containers of a host, by their ids.
type fakePods map[string]*client.Container

func (f fakePods) Get(id string) (*client.Container, error) {
	if c := f[id]; c != nil {
		return c, nil
	}
	return nil, client.ErrNotFound
}

func (f fakePods) List() ([]*client.Container, error) {
	var all []*client.Container
	for _, c := range f {
		all = append(all, c)
	}
	return all, nil
}

func (f fakePods) add(id, sandbox string, pid int, status state.Status) {
	f[id] = &client.Container{Status: status, Record: &state.Record{
		ID: id, SandboxID: sandbox, StandIn: state.ProcessRef{Pid: pid}, Status: status, VCPUs: 2, MemoryMiB: 512,
	}}
}

func TestFindPod(t *testing.T) {
	const far = 1 << 30 // no process has such a pid
	pods := fakePods{}
	pods.add("sb", "sb", far+1, state.Running)
	pods.add("member", "sb", far+2, state.Running)
	pods.add("other", "other", far+3, state.Paused)
	pods.add("dead", "dead", far+4, state.Stopped)
	pods.add("new", "new", far+5, state.Creating)
	pinned := filepath.Join(t.TempDir(), "ipc")
	if err := os.WriteFile(pinned, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	// The sandbox's own configuration names the pinned namespace.
	text, err := json.Marshal(&specs.Spec{
		Version: "1.0.2", Root: &specs.Root{Path: "r"}, Process: &specs.Process{Cwd: "/", Args: []string{"x"}},
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.IPCNamespace, Path: pinned}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	pods["sb"].Bundle = t.TempDir()
	if err := os.WriteFile(filepath.Join(pods["sb"].Bundle, SpecFile), text, 0o600); err != nil {
		t.Fatal(err)
	}

	cri := func(typ, id string) map[string]string {
		return map[string]string{"io.kubernetes.cri.container-type": typ, "io.kubernetes.cri.sandbox-id": id}
	}
	crio := func(typ, id string) map[string]string {
		return map[string]string{"io.kubernetes.cri-o.ContainerType": typ, "io.kubernetes.cri-o.SandboxID": id}
	}
	path := func(pid int, name string) string { return fmt.Sprintf("/proc/%d/ns/%s", pid, name) }
	for _, tc := range []struct {
		name    string
		pod     string
		ann     map[string]string
		typ     specs.LinuxNamespaceType
		path    string
		sandbox string // want
		owner   string // want, of the namespace
		err     string
	}{
		{name: "alone"},
		{name: "new namespace", typ: specs.IPCNamespace},
		{name: "containerd's sandbox", ann: cri("sandbox", "me")},
		{name: "containerd's container", ann: cri("container", "sb"), sandbox: "sb"},
		{name: "CRI-O's container", ann: crio("container", "sb"), sandbox: "sb"},
		{name: "by name", pod: "sb", sandbox: "sb"},
		{name: "by name, as the annotation says", pod: "sb", ann: cri("container", "sb"), sandbox: "sb"},
		{name: "by namespace", typ: specs.IPCNamespace, path: path(far+1, "ipc"), sandbox: "sb", owner: "sb"},
		{name: "by network", typ: specs.NetworkNamespace, path: path(far+3, "net"), sandbox: "other", owner: "other"},
		{name: "by pid of a member", typ: specs.PIDNamespace, path: path(far+2, "pid"), sandbox: "sb", owner: "member"},
		{name: "by name and namespace", pod: "sb", typ: specs.PIDNamespace, path: path(far+2, "pid"), sandbox: "sb", owner: "member"},
		{name: "pinned by the sandbox", ann: crio("sandbox", "me"), typ: specs.IPCNamespace, path: pinned, owner: "me"},
		{name: "pinned for the container", ann: crio("container", "sb"), typ: specs.IPCNamespace, path: pinned, sandbox: "sb", owner: "sb"},
		{name: "pinned for another kind", ann: crio("container", "sb"), typ: specs.UTSNamespace, path: pinned, sandbox: "sb"},
		{name: "pinned for nobody", typ: specs.IPCNamespace, path: pinned},
		{name: "the host's in a pod", ann: crio("sandbox", "me"), typ: specs.IPCNamespace, path: "/proc/self/ns/ipc"},
		{name: "of a dead container", typ: specs.IPCNamespace, path: path(far+4, "ipc")},
		{name: "of another kind", typ: specs.IPCNamespace, path: path(far+1, "uts")},
		{name: "of a thread", typ: specs.IPCNamespace, path: path(far+1, "task/1/ns/ipc")},
		{name: "of nobody", typ: specs.IPCNamespace, path: path(far+9, "ipc")},

		{name: "no such pod", pod: "x", err: `--pod: there is no sandbox container "x"`},
		{name: "no such sandbox", ann: cri("container", "x"), err: `annotations["io.kubernetes.cri.sandbox-id"]: there is no sandbox container "x"`},
		{name: "its own pod", pod: "me", err: "--pod: is the container itself"},
		{name: "no id", pod: "a/b", err: "--pod: "},
		{name: "dead pod", pod: "dead", err: `--pod: the sandbox container "dead" has stopped`},
		{name: "half a pod", ann: crio("container", "new"), err: `annotations["io.kubernetes.cri-o.SandboxID"]: the sandbox container "new" is not created yet`},
		{name: "a member's pod", pod: "member", err: `--pod: container "member" is no sandbox: it belongs to the pod of "sb"`},
		{name: "sandbox and member", pod: "sb", ann: cri("sandbox", "me"), err: `--pod sb: annotations["io.kubernetes.cri.container-type"] makes`},
		{name: "two pods", pod: "sb", ann: cri("container", "other"), err: `--pod sb: annotations["io.kubernetes.cri.sandbox-id"] says`},
		{name: "two pods by namespace", pod: "sb", typ: specs.PIDNamespace, path: path(far+3, "pid"), err: `linux.namespaces[1].path: /proc/1073741827/ns/pid belongs to the pod of "other", but by --pod the container is in that of "sb"`},
		{name: "sandbox in a pod", ann: cri("sandbox", "me"), typ: specs.UTSNamespace, path: path(far+1, "uts"), err: `linux.namespaces[1].path: /proc/1073741825/ns/uts belongs to the pod of "sb"`},
		{name: "unknown role", ann: cri("podsandbox", "me"), err: `annotations["io.kubernetes.cri.container-type"]: is "podsandbox"`},
		{name: "no sandbox named", ann: map[string]string{"io.kubernetes.cri.container-type": "container"}, err: `annotations["io.kubernetes.cri.sandbox-id"]: is missing`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			spec := &specs.Spec{Annotations: tc.ann, Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.MountNamespace}}}}
			if tc.typ != "" {
				spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: tc.typ, Path: tc.path})
			}
			p, err := findPod(&Options{ID: "me", Pod: tc.pod, Pods: pods}, spec)
			if tc.err != "" {
				if err == nil || !strings.HasPrefix(err.Error(), tc.err) {
					t.Fatalf("got %v, want %s…", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			sandbox := ""
			if p.sandbox != nil {
				sandbox = p.sandbox.ID
			}
			if sandbox != tc.sandbox || p.shared != (tc.pod != "") {
				t.Errorf("joins %q (shared: %v), want %q", sandbox, p.shared, tc.sandbox)
			}
			if tc.path != "" {
				if got := p.owner(spec)(tc.typ, tc.path); got != tc.owner {
					t.Errorf("the namespace belongs to %q, want %q", got, tc.owner)
				}
			}
		})
	}
}

// The stand-in here is this process, which is in the host's network namespace or
// at least in one that can be named.
func TestPodNetwork(t *testing.T) {
	const own = "/proc/self/ns/net"
	onHost := idOf(own) == hostID(specs.NetworkNamespace)
	ns := func(path string) *specs.Spec {
		return &specs.Spec{Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.NetworkNamespace, Path: path}}}}
	}
	alone := &pod{}
	if got, err := alone.network(ns(""), false); err != nil || got != client.NetworkNew {
		t.Errorf("a new one: %q, %v", got, err)
	}
	if onHost {
		if got, err := alone.network(ns(own), false); err == nil || !strings.Contains(err.Error(), "linux.namespaces[0].path") {
			t.Errorf("the host's: %q, %v", got, err)
		}
		if got, err := alone.network(ns(own), true); err != nil || got != client.NetworkHost {
			t.Errorf("the host's, with user-mode networking: %q, %v", got, err)
		}
	}
	pods := fakePods{}
	pods.add("sb", "sb", os.Getpid(), state.Running)
	pods.add("gone", "gone", 1<<30, state.Running)
	member := &pod{sandbox: pods["sb"]}
	if got, err := member.network(ns(""), false); err != nil || got != client.NetworkNew {
		t.Errorf("one of its own: %q, %v", got, err)
	}
	want := networkOf(pods["sb"])
	if onHost {
		want = client.NetworkHost
	}
	for _, m := range []struct {
		p    *pod
		spec *specs.Spec
	}{{member, ns(own)}, {&pod{sandbox: pods["sb"], shared: true}, ns("")}} {
		if got, err := m.p.network(m.spec, false); err != nil || got != want {
			t.Errorf("the pod's: %q, %v; want %q", got, err, want)
		}
	}
	if got, err := (&pod{sandbox: pods["gone"]}).network(ns(own), false); err == nil || !strings.Contains(err.Error(), "has stopped") {
		t.Errorf("of a pod that is gone: %q, %v", got, err)
	}
}

func TestSharedMemory(t *testing.T) {
	for _, dir := range []string{"/proc", "/not/here", t.TempDir()} {
		if name, _ := sharedMemory(dir); name != "" {
			t.Errorf("%s is shared memory", dir)
		}
	}
	// A tmpfs that most machines have.
	if name, size := sharedMemory("/dev/shm"); isMountPoint("/dev/shm") && (name == "" || size == 0) {
		t.Errorf("/dev/shm: %q with %d bytes", name, size)
	}
}
