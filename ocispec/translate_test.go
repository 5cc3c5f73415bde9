package ocispec

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
)

var update = flag.Bool("update", false, "write the golden files")

func loadTest(tb testing.TB, name string) *specs.Spec {
	tb.Helper()
	f, err := os.Open(filepath.Join("testdata", name+".json"))
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	spec, err := Load(f)
	if err != nil {
		tb.Fatal(err)
	}
	return spec
}

// testOptions are those of a host with some hardware, for a container "c1".
func testOptions(warnings *[]string) Options { return podOptions(warnings, "c1") }

// podOptions are testOptions on a host where namespaces of the pod are pinned
// for the container with the id in pinned.
func podOptions(warnings *[]string, pinned string) Options {
	return Options{
		ID: "c1", Bundle: "/bundle", Arch: "amd64", MaxVCPUs: 8, MaxMemoryMiB: 16384,
		VM: &supervisorv1.VM{Vcpus: 1, MemoryMib: 512, Kernel: "/var/lib/runv/kernel", Initrd: "/var/lib/runv/initrd.img", Network: NetworkNone, BootTimeoutMs: 60000},
		HostDevice: func(_, typ string, major, minor int64) bool {
			return (major == 10 || major == 8) && minor != 666 && !VirtualDevice(typ, major, minor)
		},
		Namespace: func(_ specs.LinuxNamespaceType, p string) string {
			switch {
			case strings.HasPrefix(p, "/proc/4242/ns/"):
				return "sb0"
			case strings.HasPrefix(p, "/var/run/ipcns/"), strings.HasPrefix(p, "/var/run/utsns/"):
				return pinned
			}
			return ""
		},
		SharedMemory: func(p string) (string, uint64) {
			if strings.HasSuffix(p, "/shm") {
				return "of-" + strings.ReplaceAll(path.Base(path.Dir(p)), "/", "-"), 64 << 20
			}
			return "", 0
		},
		Warn: func(line string) {
			if warnings != nil {
				*warnings = append(*warnings, line)
			}
		},
	}
}

// golden is the translation and the warnings as text that is always the same;
// of a filter it has the length only.
func golden(t *testing.T, req *supervisorv1.CreateRequest, warnings []string) []byte {
	t.Helper()
	data, err := protojson.Marshal(req)
	if err != nil {
		t.Fatal(err)
	}
	var v map[string]any
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	if s, ok := v["container"].(map[string]any)["seccomp"].(map[string]any); ok {
		s["filter"] = fmt.Sprintf("%d instructions", len(req.GetContainer().GetSeccomp().GetFilter())/8)
	}
	data, err = json.MarshalIndent(map[string]any{"request": v, "warnings": warnings}, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	return append(data, '\n')
}

func TestTranslateGolden(t *testing.T) {
	for _, tc := range []struct {
		name    string
		options func(o *Options)
	}{
		{"runc", nil},
		{"docker", nil},
		{"docker-privileged", nil},
		{"podman", func(o *Options) { o.SystemdCgroup = true }},
		{"cri", func(o *Options) { o.SystemdCgroup, o.SandboxID = true, "sb0" }},
		{"exotic", nil},
		{"cri-sandbox", func(o *Options) { o.SystemdCgroup = true }},
		{"crio-sandbox", func(o *Options) { o.SystemdCgroup = true }},
		{"crio", func(o *Options) {
			o.SystemdCgroup, o.SandboxID = true, "sb0"
			o.Namespace = podOptions(nil, "sb0").Namespace
		}},
		{"podman-infra", nil},
		{"podman-pod", func(o *Options) { o.SandboxID = "sb0" }},
		{"joined", func(o *Options) { o.SandboxID, o.Shared = "sb0", true }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var warnings []string
			o := testOptions(&warnings)
			if tc.options != nil {
				tc.options(&o)
			}
			req, err := Translate(loadTest(t, tc.name), o)
			if err != nil {
				t.Fatal(err)
			}
			got := golden(t, req, warnings)
			file := filepath.Join("testdata", tc.name+".golden")
			if *update {
				if err := os.WriteFile(file, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%s differs from the translation, look at it and run the test with -update:\n%s", file, got)
			}
		})
	}
}

// Translate keeps nothing of one call for the next, and changes neither the
// configuration nor the options.
func TestTranslateIsPure(t *testing.T) {
	spec := loadTest(t, "exotic")
	before, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	o := testOptions(nil)
	first, err := Translate(spec, o)
	if err != nil {
		t.Fatal(err)
	}
	second, err := Translate(spec, o)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(golden(t, first, nil), golden(t, second, nil)) {
		t.Error("two translations differ")
	}
	after, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(before, after) {
		t.Error("Translate changed the configuration")
	}
	if o.VM.Network != NetworkNone {
		t.Error("Translate changed the options")
	}
}

func TestTranslateVMSize(t *testing.T) {
	p := func(n int64) *int64 { return &n }
	u := func(n uint64) *uint64 { return &n }
	for _, tc := range []struct {
		name        string
		res         *specs.LinuxResources
		annotations map[string]string
		vm          *supervisorv1.VM
		cpus, mib   uint32
	}{
		{name: "defaults", cpus: 1, mib: 512},
		{name: "left to the supervisor", vm: &supervisorv1.VM{}},
		{name: "small limit", res: &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: p(64 << 20)}}, cpus: 1, mib: 512},
		{name: "large limit", res: &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: p(2 << 30)}}, cpus: 1, mib: 2048 + 32 + 128},
		{name: "above the host", res: &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: p(1 << 40)}}, cpus: 1, mib: 16384},
		{name: "as good as none", res: &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: p(9223372036854771712)}}, cpus: 1, mib: 512},
		{name: "no limit", res: &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: p(-1)}}, cpus: 1, mib: 512},
		{name: "half a processor", res: &specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: p(50000)}}, cpus: 1, mib: 512},
		{name: "two and a half", res: &specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: p(25000), Period: u(10000)}}, cpus: 3, mib: 512},
		{name: "more than the host has", res: &specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: p(9000000)}}, cpus: 8, mib: 512},
		{name: "annotations decide", res: &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: p(2 << 30)}}, annotations: map[string]string{AnnotationMemory: "96", AnnotationVCPUs: "2"}, cpus: 2, mib: 96},
		{name: "units", annotations: map[string]string{AnnotationMemory: "2GiB"}, cpus: 1, mib: 2048},
	} {
		t.Run(tc.name, func(t *testing.T) {
			spec := Example(false)
			spec.Annotations = tc.annotations
			if tc.res != nil {
				spec.Linux.Resources = tc.res
			}
			o := testOptions(nil)
			if tc.vm != nil {
				o.VM = tc.vm
			}
			req, err := Translate(spec, o)
			if err != nil {
				t.Fatal(err)
			}
			if req.Vm.Vcpus != tc.cpus || req.Vm.MemoryMib != tc.mib {
				t.Errorf("%d processors and %d MiB, want %d and %d", req.Vm.Vcpus, req.Vm.MemoryMib, tc.cpus, tc.mib)
			}
		})
	}
}

func TestTranslateNetwork(t *testing.T) {
	withNS, without := Example(false), Example(false)
	without.Linux.Namespaces = without.Linux.Namespaces[:1]
	without.Hostname, without.Linux.MaskedPaths, without.Linux.ReadonlyPaths = "", nil, nil
	o := testOptions(nil)

	req, err := Translate(withNS, o)
	if err != nil || req.Vm.Network != NetworkNone || req.Container.GuestResolvConf {
		t.Errorf("network of its own: %v %v", req.GetVm(), err)
	}
	_, err = Translate(without, o)
	if err == nil || !strings.Contains(err.Error(), "host networking cannot exist in a VM") {
		t.Errorf("host network: %v", err)
	}
	without.Linux = nil
	if _, err = Translate(without, o); err == nil || !strings.Contains(err.Error(), "host networking cannot exist in a VM") {
		t.Errorf("no linux section: %v", err)
	}
	without.Annotations = map[string]string{AnnotationNetwork: NetworkUser}
	req, err = Translate(without, o)
	if err != nil || req.Vm.Network != NetworkUser || !req.Container.GuestResolvConf {
		t.Errorf("asked for by annotation: %v %v", req.GetVm(), err)
	}
	without.Annotations = nil
	o.VM.Network = NetworkUser
	without.Mounts = append(without.Mounts, specs.Mount{Destination: "/etc/resolv.conf", Source: "/r", Options: []string{"bind"}})
	req, err = Translate(without, o)
	if err != nil || req.Vm.Network != NetworkUser || req.Container.GuestResolvConf {
		t.Errorf("asked for by configuration: %v %v", req.GetVm(), err)
	}
}

func TestTranslateNoCapabilities(t *testing.T) {
	spec := Example(false)
	spec.Process.Capabilities = nil
	req, err := Translate(spec, testOptions(nil))
	if err != nil {
		t.Fatal(err)
	}
	if c := req.Container.Process.Capabilities; c == nil || c.Bounding != 0 {
		t.Errorf("a process that lists no capabilities gets %v", c)
	}
	p, err := TranslateProcess(spec.Process, nil)
	if err != nil || p.Capabilities != nil {
		t.Errorf("an exec that lists none: %v %v", p.GetCapabilities(), err)
	}
}

func TestTranslateResources(t *testing.T) {
	limit := int64(1 << 20)
	r, err := TranslateResources(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit, Swap: &limit}}, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	if r.Unified["memory.max"] != "1048576" || r.Unified["memory.swap.max"] != "0" {
		t.Errorf("got %v", r.Unified)
	}
	if _, err := TranslateResources(&specs.LinuxResources{Memory: &specs.LinuxMemory{Swap: &limit}}, 1, nil); err == nil {
		t.Error("swap without a limit is accepted")
	}
}

// Everything that `spec` writes runs as it is.
func TestExample(t *testing.T) {
	for _, rootless := range []bool{false, true} {
		data, err := json.MarshalIndent(Example(rootless), "", "\t")
		if err != nil {
			t.Fatal(err)
		}
		spec, err := Load(bytes.NewReader(data))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Translate(spec, testOptions(nil)); err != nil {
			t.Errorf("rootless %v: %v", rootless, err)
		}
	}
}

func TestState(t *testing.T) {
	req, err := Translate(loadTest(t, "exotic"), testOptions(nil))
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(State(req.Container.HookState, specs.StateCreated, 42))
	if err != nil {
		t.Fatal(err)
	}
	want := `{"ociVersion":"1.3.0","id":"c1","status":"created","pid":42,"bundle":"/bundle","annotations":{"io.runv.network":"user","org.example.key":"value"}}`
	if string(data) != want {
		t.Errorf("got  %s\nwant %s", data, want)
	}
	if s := State(req.Container.HookState, specs.StateStopped, 42); s.Pid != 0 {
		t.Errorf("a stopped container has pid %d", s.Pid)
	}
}

func TestFeatures(t *testing.T) {
	f := Features()
	for _, name := range f.MountOptions {
		o := parseMountOptions([]string{name})
		if len(o.data) > 0 {
			t.Errorf("%s is listed and not known", name)
		}
	}
	if o := parseMountOptions([]string{"size=1m"}); len(o.data) != 1 {
		t.Error("size=1m is not the file system's")
	}
	for _, name := range f.Linux.Namespaces {
		if (&namespaceSet{}).slot(specs.LinuxNamespaceType(name)) == nil {
			t.Errorf("%s is listed and not known", name)
		}
	}
	for _, name := range f.Linux.Capabilities {
		if _, ok := CapabilityNumber(name); !ok {
			t.Errorf("%s is listed and not known", name)
		}
	}
}

func TestVirtualDevice(t *testing.T) {
	for _, tc := range []struct {
		typ          string
		major, minor int64
		want         bool
	}{
		{"c", 1, 3, true},
		{"c", 5, 0, true},
		{"c", 10, 200, true},
		{"c", 10, 229, true},
		{"c", 136, 0, true},
		{"b", 7, 0, true},
		{"p", 0, 0, true},
		{"c", 10, 232, false},
		{"b", 8, 0, false},
		{"c", 226, 128, false},
	} {
		if got := VirtualDevice(tc.typ, tc.major, tc.minor); got != tc.want {
			t.Errorf("%s %d:%d: %v", tc.typ, tc.major, tc.minor, got)
		}
	}
}

func BenchmarkDocker(b *testing.B) {
	data, err := os.ReadFile("testdata/docker.json")
	if err != nil {
		b.Fatal(err)
	}
	o := testOptions(nil)
	b.Run("load", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := Load(bytes.NewReader(data)); err != nil {
				b.Fatal(err)
			}
		}
	})
	spec := loadTest(b, "docker")
	b.Run("validate", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := Validate(spec); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("translate", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := Translate(spec, o); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func TestBindMountWithData(t *testing.T) {
	var warnings []string
	o := testOptions(&warnings)
	s := Example(false)
	s.Mounts[1] = specs.Mount{Destination: "/x", Source: "/y", Options: []string{"bind", "mode=755", "size=1k", "ro"}}
	req, err := Translate(s, o)
	if err != nil {
		t.Fatal(err)
	}
	if m := req.Container.Mounts[1]; len(m.Data) > 0 || m.AttrSet&unix.MOUNT_ATTR_RDONLY == 0 {
		t.Errorf("the guest is asked for %v", m)
	}
	if want := `mounts[1].options: ["mode=755" "size=1k"] has no effect on a bind mount`; !slices.Contains(warnings, want) {
		t.Errorf("warnings %q, want %q", warnings, want)
	}
}
