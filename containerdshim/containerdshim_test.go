package containerdshim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	taskv2 "github.com/containerd/containerd/api/runtime/task/v2"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/mount"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/client"
	"github.com/hyperhq/runv/ocispec"
	"github.com/hyperhq/runv/state"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("github.com/golang/glog.(*fileSink).flushDaemon"))
}

// The service answers version 2 with the messages of version 3.
func TestVersionsHaveTheSameMessages(t *testing.T) {
	v2 := taskv2.File_runtime_task_v2_shim_proto.Services().ByName("Task")
	v3 := taskapi.File_runtime_task_v3_shim_proto.Services().ByName("Task")
	if string(v2.FullName()) != serviceV2 {
		t.Errorf("version 2 is %s", v2.FullName())
	}
	methods := (&service{}).methods()
	for i := range v2.Methods().Len() {
		m2 := v2.Methods().Get(i)
		m3 := v3.Methods().ByName(m2.Name())
		if m3 == nil {
			t.Errorf("%s is gone", m2.Name())
			continue
		}
		if methods[string(m2.Name())] == nil {
			t.Errorf("%s is not answered", m2.Name())
		}
		for _, p := range [][2]protoreflect.MessageDescriptor{{m2.Input(), m3.Input()}, {m2.Output(), m3.Output()}} {
			sameFields(t, p[0], p[1])
		}
	}
	if len(methods) != v2.Methods().Len() {
		t.Errorf("%d methods, want %d", len(methods), v2.Methods().Len())
	}
}

func sameFields(t *testing.T, a, b protoreflect.MessageDescriptor) {
	t.Helper()
	for i := range a.Fields().Len() {
		fa := a.Fields().Get(i)
		fb := b.Fields().ByNumber(fa.Number())
		switch {
		case fb == nil:
			t.Errorf("%s: field %d is gone", a.FullName(), fa.Number())
		case fa.Kind() != fb.Kind(), fa.Cardinality() != fb.Cardinality(), fa.Name() != fb.Name():
			t.Errorf("%s: field %d is %s, then %s", a.FullName(), fa.Number(), fa, fb)
		}
	}
}

func pack(t *testing.T, m proto.Message) *anypb.Any {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return &anypb.Any{TypeUrl: string(m.ProtoReflect().Descriptor().FullName()), Value: b}
}

func TestLoadSettings(t *testing.T) {
	dir := t.TempDir()
	file, other := filepath.Join(dir, "a.toml"), filepath.Join(dir, "b.toml")
	for f, text := range map[string]string{file: "root = \"/run/a\"\nmemory = 300\n", other: "root = \"/run/b\"\n"} {
		if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv(ConfigEnv, other)
	for _, tc := range []struct {
		name    string
		options *anypb.Any
		root    string
		memory  int
		systemd bool
		err     string
	}{
		{name: "none", root: "/run/b-containerd/k8s.io", memory: 512},
		{name: "path", options: pack(t, &runtimeoptions.Options{ConfigPath: file}), root: "/run/a-containerd/k8s.io", memory: 300},
		{
			name: "path wins", options: pack(t, &runtimeoptions.Options{ConfigPath: file, ConfigBody: []byte("memory = 400")}),
			root: "/run/a-containerd/k8s.io", memory: 300,
		},
		{name: "body", options: pack(t, &runtimeoptions.Options{ConfigBody: []byte("memory = 400")}), root: "/run/runv-containerd/k8s.io", memory: 400},
		{name: "runc's", options: pack(t, &runcoptions.Options{Root: "/run/r", SystemdCgroup: true}), root: "/run/r/k8s.io", memory: 512, systemd: true},
		{name: "unknown key", options: pack(t, &runtimeoptions.Options{ConfigBody: []byte("mem = 1")}), err: `unknown key "mem"`},
		{name: "no such file", options: pack(t, &runtimeoptions.Options{ConfigPath: dir + "/none"}), err: "no such file"},
		{name: "bad bytes", options: &anypb.Any{TypeUrl: "containerd.runc.v1.Options", Value: []byte{255}}, err: "options"},
		{name: "another type", options: &anypb.Any{TypeUrl: "x.Y"}, err: "options: x.Y is of no type"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, err := loadSettings(tc.options, "k8s.io")
			if tc.err != "" {
				if err == nil || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("%v, want %q", err, tc.err)
				}
				return
			}
			if err != nil || s.root != tc.root || s.config.Memory != tc.memory || s.systemd != tc.systemd {
				t.Errorf("%+v, %v", s, err)
			}
		})
	}
	if _, err := loadSettings(nil, "../x"); err == nil || !strings.Contains(err.Error(), "namespace") {
		t.Errorf("a namespace with a path is accepted: %v", err)
	}
}

func TestRecord(t *testing.T) {
	dir := t.TempDir()
	if r, err := readRecord(dir); r != nil || err != nil {
		t.Errorf("%v, %v", r, err)
	}
	want := record{Shim: state.Self(), Own: true, Address: "unix:///a", Root: "/r"}
	if err := want.write(dir); err != nil {
		t.Fatal(err)
	}
	// Whoever makes the container keeps who started the shim.
	s := &service{}
	if err := s.note(dir, "/new"); err != nil {
		t.Fatal(err)
	}
	want.Root = "/new"
	got, err := readRecord(dir)
	if err != nil || *got != want {
		t.Errorf("%+v, %v", got, err)
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 1 {
		t.Errorf("%v, %v", files, err)
	}
	// After a boot, the process with that pid is another.
	text, err := os.ReadFile(filepath.Join(dir, recordFile))
	if err != nil || !bytes.Contains(text, []byte(state.BootID())) {
		t.Fatalf("%s, %v", text, err)
	}
	text = bytes.Replace(text, []byte(state.BootID()), []byte("another"), 1)
	if err := os.WriteFile(filepath.Join(dir, recordFile), text, 0o600); err != nil {
		t.Fatal(err)
	}
	want.Shim, want.BootID = state.ProcessRef{}, "another"
	if got, err := readRecord(dir); err != nil || *got != want {
		t.Errorf("%+v, %v", got, err)
	}
	if err := os.WriteFile(filepath.Join(dir, recordFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readRecord(dir); err == nil {
		t.Error("a damaged record is read")
	}
}

func TestBootstrap(t *testing.T) {
	flags := &bootapi.BootstrapParams{InstanceID: "c", Namespace: "ns"}
	sent := &bootapi.BootstrapParams{InstanceID: "c", Namespace: "ns", ContainerdTtrpcAddress: "t"}
	b, err := proto.Marshal(sent)
	if err != nil {
		t.Fatal(err)
	}
	if p, ok := bootstrap(b, flags); !ok || p.ContainerdTtrpcAddress != "t" {
		t.Errorf("%v, %v", p, ok)
	}
	// What older ones send, and others' names.
	old, err := proto.Marshal(pack(t, &runcoptions.Options{Root: "/r"}))
	if err != nil {
		t.Fatal(err)
	}
	for _, input := range [][]byte{nil, old, []byte("{}"), {255}} {
		if _, ok := bootstrap(input, flags); ok {
			t.Errorf("%q is taken for a message of containerd 2.3", input)
		}
	}
	if _, ok := bootstrap(b, &bootapi.BootstrapParams{InstanceID: "d", Namespace: "ns"}); ok {
		t.Error("the message for another container is taken")
	}
}

func FuzzBootstrap(f *testing.F) {
	b, _ := proto.Marshal(&bootapi.BootstrapParams{InstanceID: "c", Namespace: "ns"})
	f.Add(b)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, ok := bootstrap(b, &bootapi.BootstrapParams{InstanceID: "c", Namespace: "ns"}); ok && p.InstanceID != "c" {
			t.Errorf("%v", p)
		}
	})
}

func FuzzOutput(f *testing.F) {
	for _, s := range []string{"", "/run/fifo", "file:///l", "binary:///bin/l?a=b", "fifo://x", "%"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		o, err := outputOf(s)
		if err == nil && o.program() && !filepath.IsAbs(o.path) {
			t.Errorf("%q: %+v", s, o)
		}
	})
}

func TestGroup(t *testing.T) {
	for _, tc := range []struct{ spec, want string }{
		{`{}`, "c"},
		{`{"annotations":{"io.kubernetes.cri.container-type":"sandbox","io.kubernetes.cri.sandbox-id":"c"}}`, "c"},
		{`{"annotations":{"io.kubernetes.cri.container-type":"container","io.kubernetes.cri.sandbox-id":"pod"}}`, "pod"},
		{`{"annotations":{"io.kubernetes.cri.container-type":"container"}}`, ""},
		{`{"ociVersion":"1.0.2","linux":{"namespaces":[{"type":"network","path":"/proc/1/ns/net"},{"type":"pid"}]}}`, "c"},
		{`{`, ""},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(tc.spec), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := groupOf(dir, &bootapi.BootstrapParams{InstanceID: "c", Namespace: "ns"}); got != tc.want || (err == nil) != (tc.want != "") {
			t.Errorf("%s: %q, %v", tc.spec, got, err)
		}
	}
}

func TestOptionsOf(t *testing.T) {
	o := pack(t, &runcoptions.Options{Root: "/r"})
	other := &bootapi.Extension{Value: &anypb.Any{TypeUrl: "x.Y"}}
	if got := optionsOf(&bootapi.BootstrapParams{Extensions: []*bootapi.Extension{other, {Value: o}}}); got != o {
		t.Errorf("%v", got)
	}
	if got := optionsOf(&bootapi.BootstrapParams{Extensions: []*bootapi.Extension{other}}); got != nil {
		t.Errorf("%v", got)
	}
}

func TestRootfsDisk(t *testing.T) {
	m := func(typ, source string, options ...string) mount.Mount {
		return mount.Mount{Type: typ, Source: source, Options: options}
	}
	for _, tc := range []struct {
		mounts []mount.Mount
		want   *ocispec.RootfsDisk
	}{
		{nil, nil},
		{[]mount.Mount{m("ext4", "/dev/x")}, &ocispec.RootfsDisk{Type: "ext4", Source: "/dev/x"}},
		{[]mount.Mount{m("ext4", "/image", "rw", "loop")}, &ocispec.RootfsDisk{Type: "ext4", Source: "/image"}},
		{[]mount.Mount{m("erofs", "/image", "loop", "ro")}, &ocispec.RootfsDisk{Type: "erofs", Source: "/image", ReadOnly: true}},
		{[]mount.Mount{m("ext4", "/dev/x", "noload")}, nil},
		{[]mount.Mount{m("erofs", "/a", "device=/b")}, nil},
		{[]mount.Mount{m("erofs", "/a", "X-containerd.dmverity=/m")}, nil},
		{[]mount.Mount{m("xfs", "/dev/x")}, nil},
		{[]mount.Mount{m("overlay", "overlay", "lowerdir=/a:/b")}, nil},
		{[]mount.Mount{m("ext4", "image")}, nil},
		{[]mount.Mount{m("erofs", "/a", "ro"), m("overlay", "overlay", "lowerdir=/a")}, nil},
		{[]mount.Mount{{Type: "ext4", Source: "/dev/x", Target: "sub"}}, nil},
	} {
		if got := rootfsDisk(tc.mounts); !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%+v: %+v, want %+v", tc.mounts, got, tc.want)
		}
	}
}

func TestMountMainRefuses(t *testing.T) {
	dir := t.TempDir()
	for _, tc := range []struct {
		args  []string
		stdin string
	}{
		{nil, "[]"},
		{[]string{dir, dir}, "[]"},
		{[]string{dir}, ""},
		{[]string{dir}, `[{"Type":"no-such-file-system","Source":"none"}]`},
	} {
		if err := MountMain(tc.args, strings.NewReader(tc.stdin)); err == nil {
			t.Errorf("%v, %s: no error", tc.args, tc.stdin)
		}
	}
	var b limitedBuffer
	for range 3 {
		if n, err := b.Write(make([]byte, maxMountError)); n != maxMountError || err != nil {
			t.Fatal(n, err)
		}
	}
	if b.Len() != maxMountError {
		t.Errorf("%d bytes are kept", b.Len())
	}
}

func fifo(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// A process waits for who reads its output, so that this gets all of it also when
// the process has ended at once.
func TestReaderComesLate(t *testing.T) {
	type read struct {
		text string
		err  error
	}
	out, errs := fifo(t, "out"), fifo(t, "err")
	got := make(chan read, 2)
	for _, path := range []string{out, errs} {
		time.AfterFunc(20*time.Millisecond, func() {
			b, err := os.ReadFile(path)
			got <- read{string(b), err}
		})
	}
	x, err := openStdio(t.Context(), streams{out: out, err: errs}, "c", "ns")
	if err != nil {
		t.Fatal(err)
	}
	defer x.close()
	for _, f := range []*os.File{x.Out, x.Err} {
		if _, err := f.WriteString("said"); err != nil {
			t.Fatal(err)
		}
	}
	x.closeFiles()
	for range 2 {
		select {
		case r := <-got:
			if r.text != "said" || r.err != nil {
				t.Errorf("%q, %v", r.text, r.err)
			}
		case <-time.After(20 * time.Second):
			t.Fatal("a reader got nothing, not even the end")
		}
	}
}

// The end of a process is told when its output has been taken, if anybody takes it.
func TestOutputIsTaken(t *testing.T) {
	out := fifo(t, "out")
	r, err := os.OpenFile(out, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	x, err := openStdio(t.Context(), streams{out: out}, "c", "ns")
	if err != nil {
		t.Fatal(err)
	}
	defer x.close()
	const size = 60_000
	if _, err := x.Out.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	x.release()
	x.awaitTaken(t.Context(), takenLimit) // nobody takes any

	read := make(chan int)
	go func() {
		n := 0
		for b := make([]byte, size/20); n < size; time.Sleep(takenStep) {
			m, err := r.Read(b)
			if err != nil {
				break
			}
			n += m
		}
		read <- n
	}()
	x.awaitTaken(t.Context(), time.Minute)
	left, err := unix.IoctlGetInt(int(x.fifos[0].Fd()), unix.TIOCINQ)
	if err != nil || left != 0 {
		t.Errorf("%d bytes are left, %v", left, err)
	}
	if n := <-read; n != size {
		t.Errorf("%d bytes were read", n)
	}
}

// A process without a reader does not wait for ever: its output does; its input ends
// when the shim and all writers have closed it.
func TestFifos(t *testing.T) {
	in, out := fifo(t, "in"), fifo(t, "out")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	x, err := openStdio(ctx, streams{in: in, out: out}, "c", "ns")
	if err != nil {
		t.Fatal(err)
	}
	defer x.close()
	if x.Err != nil {
		t.Error("there is a stderr")
	}
	if _, err := x.Out.WriteString("early"); err != nil {
		t.Fatal(err)
	}
	if err := x.connect(); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second is a containerd that has been restarted
		w, err := os.OpenFile(in, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.WriteString("line\n"); err != nil {
			t.Fatal(err)
		}
		_ = w.Close()
		b := make([]byte, 5)
		if _, err := io.ReadFull(x.In, b); err != nil || string(b) != "line\n" {
			t.Fatalf("%q, %v", b, err)
		}
	}
	x.closeInput()
	if n, err := x.In.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("%d, %v", n, err)
	}
	r, err := os.OpenFile(out, os.O_RDONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	x.closeFiles()
	if b, err := io.ReadAll(r); err != nil || string(b) != "early" {
		t.Errorf("%q, %v", b, err)
	}
}

func TestLogger(t *testing.T) {
	dir := t.TempDir()
	script := filepath.Join(dir, "logger")
	text := `#!/bin/sh
echo "$CONTAINER_ID $CONTAINER_NAMESPACE $*" >` + dir + `/args
echo >&5; exec 5>&-
cat <&3 >` + dir + `/out; cat <&4 >` + dir + `/err
`
	if err := os.WriteFile(script, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, scheme := range []string{"binary", "binary-v2"} {
		uri := scheme + "://" + script + "?b=2&a=1"
		x, err := openStdio(t.Context(), streams{out: uri, err: uri}, "c", "ns")
		if err != nil {
			t.Fatal(err)
		}
		_, _ = fmt.Fprint(x.Out, "to stdout")
		_, _ = fmt.Fprint(x.Err, "to stderr")
		x.close()
		for name, want := range map[string]string{"args": "c ns a 1 b 2\n", "out": "to stdout", "err": "to stderr"} {
			if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != want {
				t.Errorf("%s: %s is %q, %v", scheme, name, b, err)
			}
		}
	}
	if err := os.WriteFile(script, []byte("#!/bin/sh\nexit 1\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := openStdio(t.Context(), streams{out: "binary-v2://" + script}, "c", "ns"); err == nil || !strings.Contains(err.Error(), "before it was ready") {
		t.Error(err)
	}
}

func TestStdioErrors(t *testing.T) {
	log := filepath.Join(t.TempDir(), "sub", "log")
	x, err := openStdio(t.Context(), streams{out: "file://" + log}, "c", "ns")
	if err != nil {
		t.Fatal(err)
	}
	_, _ = x.Out.WriteString("x")
	x.close()
	if b, err := os.ReadFile(log); err != nil || string(b) != "x" {
		t.Errorf("%q, %v", b, err)
	}
	for _, tc := range []struct {
		s    streams
		want string
	}{
		{streams{in: "/not/here"}, "stdin: "},
		{streams{out: "/not/here"}, "stdout: "},
		{streams{out: "http://x/y"}, `stdout: scheme "http"`},
		{streams{out: "file:relative"}, "no absolute path"},
		{streams{err: "binary:///bin/true"}, "must be named for stdout, too"},
	} {
		if _, err := openStdio(t.Context(), tc.s, "c", "ns"); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%+v: %v, want %q", tc.s, err, tc.want)
		}
	}
}

func TestErrorCodes(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want codes.Code
	}{
		{&client.Error{Message: "m", Kind: client.ErrNotFound}, codes.NotFound},
		{&client.Error{Message: "m", Kind: client.ErrWrongState}, codes.FailedPrecondition},
		{fmt.Errorf("m: %w", client.ErrUnavailable), codes.Unavailable},
		{&client.Error{Message: "m", Kind: client.ErrUnsupported}, codes.Unimplemented},
		{context.DeadlineExceeded, codes.DeadlineExceeded},
		{invalid("m"), codes.InvalidArgument},
		{errors.New("m"), codes.Unknown},
	} {
		if got := status.Code(toGRPC(tc.err)); got != tc.want {
			t.Errorf("%v: %v, want %v", tc.err, got, tc.want)
		}
	}
	if toGRPC(nil) != nil {
		t.Error("success is an error")
	}
}

// recorder is a containerd that takes events.
type recorder struct {
	mu     sync.Mutex
	topics []string
}

func (r *recorder) Publish(_ context.Context, topic string, _ events.Event) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.topics = append(r.topics, topic)
	return errors.New("away")
}

func TestEventsKeepTheirOrder(t *testing.T) {
	r := new(recorder)
	p := newPublisher(t.Context(), r)
	for _, e := range []events.Event{
		&eventsapi.TaskCreate{}, &eventsapi.TaskStart{}, &eventsapi.TaskExecAdded{}, &eventsapi.TaskExecStarted{},
		&eventsapi.TaskPaused{}, &eventsapi.TaskResumed{}, &eventsapi.TaskOOM{}, &eventsapi.TaskExit{}, &eventsapi.TaskDelete{},
		&eventsapi.ImageCreate{}, // none of a shim's
	} {
		p.send(e)
	}
	p.close()
	p.send(&eventsapi.TaskExit{})
	want := "/tasks/create /tasks/start /tasks/exec-added /tasks/exec-started /tasks/paused /tasks/resumed /tasks/oom /tasks/exit /tasks/delete"
	if got := strings.Join(r.topics, " "); got != want {
		t.Errorf("%s", got)
	}
}

// An end is told before whoever waits for it hears of it, and once.
func TestProcessEnds(t *testing.T) {
	p := newProcess(&task{id: "c"}, "", streams{}, created)
	told := 0
	p.end(7, func() {
		told++
		select {
		case <-p.exit:
			t.Error("somebody could know before it was told")
		default:
		}
	})
	p.end(9, func() { told++ })
	<-p.exit
	code, at := p.result()
	if told != 1 || code != 7 || time.Since(at) > time.Minute || p.current() != exited {
		t.Errorf("%d, %d, %v", told, code, at)
	}
}

func TestExecsOfATask(t *testing.T) {
	tk := &task{id: "c", execs: make(map[string]*process)}
	tk.init = newProcess(tk, "", streams{}, running)
	e := newProcess(tk, "e", streams{}, added)
	if err := tk.reserve(e); err != nil {
		t.Fatal(err)
	}
	if err := tk.reserve(newProcess(tk, "e", streams{}, added)); status.Code(err) != codes.AlreadyExists {
		t.Error(err)
	}
	if p, err := tk.process("e"); p != e || err != nil {
		t.Errorf("%v, %v", p, err)
	}
	if p, err := tk.process(""); p != tk.init || err != nil {
		t.Errorf("%v, %v", p, err)
	}
	if len(tk.running()) != 0 || len(tk.ended()) != 0 {
		t.Error("a process that was added runs or has ended")
	}
	e.end(0, nil)
	if len(tk.ended()) != 1 {
		t.Error("a process that has ended has not")
	}
	tk.forget("e")
	if _, err := tk.process("e"); status.Code(err) != codes.NotFound {
		t.Error(err)
	}
}

func TestMetrics(t *testing.T) {
	n := uint64(42)
	m := metrics(&agentv1.ContainerStats{
		Cpu:     &agentv1.CPUStats{UsageUsec: 3, ThrottledPeriods: 4},
		Memory:  &agentv1.MemoryStats{Usage: 5, Limit: &n, Stat: map[string]uint64{"anon": 6, "workingset_refault_anon": 1, "workingset_refault_file": 2}, Events: &agentv1.MemoryEvents{OomKill: 7}},
		Pids:    &agentv1.PidsStats{Current: 8},
		Io:      []*agentv1.IOStats{{Major: 8, ReadBytes: 9}},
		Network: []*agentv1.NetworkStats{{Name: "eth0", RxBytes: 10}},
	})
	if m.CPU.UsageUsec != 3 || m.CPU.NrThrottled != 4 || m.Memory.Usage != 5 || m.Memory.UsageLimit != 42 || m.Memory.SwapLimit != math.MaxUint64 ||
		m.Memory.Anon != 6 || m.Memory.WorkingsetRefault != 3 || m.MemoryEvents.OomKill != 7 || m.Pids.Limit != math.MaxUint64 ||
		m.Io.Usage[0].Rbytes != 9 || m.Network[0].RxBytes != 10 {
		t.Errorf("%v", m)
	}
	if got := metrics(nil); got.CPU != nil || got.Memory != nil {
		t.Errorf("%v", got)
	}
}

func TestOwnPIDs(t *testing.T) {
	ns := func(path string) *specs.Spec {
		return &specs.Spec{Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace, Path: path}}}}
	}
	if !hasOwnPIDs(ns("")) || hasOwnPIDs(ns("/proc/1/ns/pid")) || hasOwnPIDs(&specs.Spec{}) {
		t.Error("wrong")
	}
}

func TestStartRefuses(t *testing.T) {
	t.Chdir(t.TempDir())
	var out bytes.Buffer
	err := StartMain(t.Context(), []string{"shim", "-namespace", "ns", "-id", "c", "start"}, strings.NewReader(""), &out)
	if !errors.Is(err, os.ErrNotExist) || out.Len() > 0 {
		t.Errorf("%v, %q", err, out.String())
	}
	if err := StartMain(t.Context(), []string{"shim", "-nonsense", "start"}, strings.NewReader(""), &out); err == nil {
		t.Error("an unknown flag is taken")
	}
}

func TestInfo(t *testing.T) {
	info, err := Manager{}.Info(t.Context(), strings.NewReader(""))
	if err != nil || info.Name != Name || len(info.Features.GetValue()) == 0 {
		t.Errorf("%v, %v", info, err)
	}
}

// Nothing to delete is no error: containerd calls it when a start has failed.
func TestStopWithoutAnything(t *testing.T) {
	t.Chdir(t.TempDir())
	st, err := Manager{}.Stop(t.Context(), "c")
	if err != nil || st.ExitStatus != 137 {
		t.Errorf("%+v, %v", st, err)
	}
	// Started, but no container was made.
	if err := (&record{Shim: state.ProcessRef{Pid: 1 << 30, StartTime: 1}, Own: true, Root: t.TempDir()}).write("."); err != nil {
		t.Fatal(err)
	}
	if st, err = (Manager{}).Stop(t.Context(), "c"); err != nil || st.ExitStatus != 137 {
		t.Errorf("%+v, %v", st, err)
	}
}
