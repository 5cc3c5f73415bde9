package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/tests/bench/load"
)

func samplePart() *part {
	p := &part{
		Name: partNetwork, Beside: []string{"runc"}, Notes: []string{"A note."},
		Columns:    []contenderInfo{{Name: "runv"}, {Name: "bare", Why: "too bare"}, {Name: "runc"}},
		Quantities: []quantity{{"send", "sent", "MB/s", 1e-6}, {"latency", "there and back", "µs", 1e6}, {"none", "never", "s", 1}},
	}
	for _, x := range []float64{90e6, 110e6, 100e6} {
		p.add("runv", "send", x)
	}
	p.add("runc", "send", 400e6)
	p.add("runc", "latency", 20e-6)
	p.fail("runv", errors.New("broken"))
	p.leaveOut("%s: the rest", "runv")
	return p
}

func TestPartReport(t *testing.T) {
	p := samplePart()
	var text bytes.Buffer
	if err := p.text(&text); err != nil {
		t.Fatal(err)
	}
	md := p.markdown()
	contains(t, text.String(),
		"== Network ==",
		"not available: too bare",
		"FAILURES\nrunv: broken")
	contains(t, md,
		"A note.\n",
		"|  | runv | runc |",
		"| sent, MB/s | 100 (90.0 to 110) | 400 |",
		"| there and back, µs | – | 20.0 |",
		"| sent | 0.25 | 1.00 |",
		"- runv: the rest")
	if strings.Contains(md, "never") {
		t.Errorf("a row without values:\n%s", md)
	}
}

// Parts go where their marks are, and leave the others alone.
func TestDocument(t *testing.T) {
	full := sample()
	full.Parts = []*part{samplePart()}
	alone := &result{Schema: schema, Parts: full.Parts}
	begin, end := marks(partNetwork)
	startsBegin, startsEnd := marks(partStarts)
	doc := "a\n" + startsBegin + "\nold starts\n" + startsEnd + "\nb\n" + begin + "\nold network\n" + end + "\nz\n"
	got := alone.document(doc, "")
	if !strings.Contains(got, "old starts") || strings.Contains(got, "old network") || !strings.Contains(got, "| sent, MB/s |") || !strings.HasSuffix(got, end+"\nz\n") {
		t.Errorf("a part alone:\n%s", got)
	}
	got = full.document(doc, "p.svg")
	if strings.Contains(got, "old starts") || strings.Contains(got, "old network") || !strings.Contains(got, "(p.svg)\n"+startsEnd) {
		t.Errorf("both:\n%s", got)
	}
	if got := full.document("anything", ""); !strings.HasPrefix(got, "Measured on") || !strings.Contains(got, "\n## Network\n") {
		t.Errorf("a document without marks:\n%s", got)
	}
}

// A part that was saved gives the same report again.
func TestPartSaved(t *testing.T) {
	r := &result{Schema: schema, Parts: []*part{samplePart()}}
	o := options{json: filepath.Join(t.TempDir(), "r.json")}
	if err := r.save(o); err != nil {
		t.Fatal(err)
	}
	again, err := loadResult(o.json)
	if err != nil {
		t.Fatal(err)
	}
	if a, b := r.document("", ""), again.document("", ""); a != b {
		t.Errorf("%s\nand from the file:\n%s", a, b)
	}
}

func TestOnly(t *testing.T) {
	for _, c := range []struct {
		only  string
		parts string
		not   []string // columns
		yes   []string
	}{
		{"", "starts network storage", nil, []string{"runc", "runv pool"}},
		{"network", "network", nil, []string{"runc", "bare QEMU"}},
		{"network,storage", "network storage", nil, []string{"runc"}},
		{"runv pool", "starts", []string{"runc"}, []string{"runv pool"}},
		{"runv 9p,runc", "starts network storage", []string{"crun"}, []string{"runc"}},
		{"storage,runv 9p,runc", "storage", []string{"crun"}, []string{"runc"}},
	} {
		args := []string{}
		if c.only != "" {
			args = append(args, "--only", c.only)
		}
		o, err := parse(args)
		if err != nil {
			t.Errorf("%q: %v", c.only, err)
			continue
		}
		var did []string
		for _, p := range parts {
			if o.does(p) {
				did = append(did, p)
			}
		}
		if got := strings.Join(did, " "); got != c.parts {
			t.Errorf("%q: parts %s, want %s", c.only, got, c.parts)
		}
		if slices.ContainsFunc(c.not, o.wants) || slices.ContainsFunc(c.yes, func(n string) bool { return !o.wants(n) }) {
			t.Errorf("%q: wrong columns", c.only)
		}
	}
	if _, err := parse([]string{"--only", "nothing"}); err == nil {
		t.Error("an unknown name is taken")
	}
}

// Who is slow gets its first round, and no more than its share.
func TestRounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &bench{progress: func(string, ...any) {}}
		p := &part{Name: "test"}
		var order []string
		b.rounds(t.Context(), p, []string{"slow", "quick", "bad"}, 5, 60*time.Second, func(column string) error {
			order = append(order, column[:1])
			switch column {
			case "slow":
				time.Sleep(25 * time.Second)
			case "bad":
				return errors.New("no")
			}
			time.Sleep(time.Second)
			return nil
		})
		// Of 60 s the others need 5, which leaves two rounds for the slow one.
		if got := strings.Join(order, ""); got != "sqbsqbqbqq" {
			t.Errorf("the order was %s", got)
		}
		if len(p.LeftOut) != 2 || len(p.Failures) != failuresAllowed {
			t.Errorf("left out %q, failures %q", p.LeftOut, p.Failures)
		}
	})
}

func TestBareArgs(t *testing.T) {
	model := strings.Split("/usr/bin/qemu -name guest=x,debug-threads=on -no-user-config -nodefaults -display none -machine microvm,memory-backend=ram"+
		" -accel tcg -global a.b=off -cpu max -smp 1 -m 512M -object memory-backend-ram,id=ram,size=512M -chardev socket,id=qmp,fd=3"+
		" -fsdev local,id=s -device virtio-9p-device,fsdev=s -netdev tap,id=net0,fd=9 -device virtio-net-device,id=nic0,netdev=net0 -no-reboot -sandbox on"+
		" -kernel /k -initrd /i", " ")
	model = append(model, "-append", "console=ttyS0 quiet")
	got, err := bareArgs(model, "/mine", netip.MustParsePrefix("10.0.0.2/24"))
	if err != nil {
		t.Fatal(err)
	}
	want := "/usr/bin/qemu -name guest=bare,debug-threads=on -no-user-config -nodefaults -display none -no-reboot -machine microvm,memory-backend=ram" +
		" -accel tcg -global a.b=off -cpu max -smp 1 -m 512M -object memory-backend-ram,id=ram,size=512M -kernel /k -initrd /mine" +
		" -append console=ttyS0 quiet rdinit=/" + load.Program + " -- guest 10.0.0.2/24 7 -serial stdio -netdev tap,id=net0,fd=3 -device virtio-net-device,netdev=net0"
	if s := strings.Join(got, " "); s != want {
		t.Errorf("got  %s\nwant %s", s, want)
	}
	if _, err := bareArgs([]string{"qemu", "-m", "1"}, "/mine", netip.Prefix{}); err == nil {
		t.Error("a machine without a kernel is taken")
	}
}

func TestThreadTime(t *testing.T) {
	name, d, err := threadTime("7 (CPU 0/TCG) S 1 7 7 0 -1 4194368 1 0 0 0 150 25 0 0 20 0 5 0 1 2 3")
	if err != nil || name != "CPU 0/TCG" || d != 1750*time.Millisecond {
		t.Errorf("%q, %v, %v", name, d, err)
	}
	for _, bad := range []string{"", "7 (x) S 1", "7 (x) S 1 7 7 0 -1 4194368 1 0 0 0 a b 0"} {
		if _, _, err := threadTime(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

func said(text ...string) []saying {
	var all []saying
	began := time.Now()
	for i, s := range text {
		all = append(all, saying{s, began.Add(time.Duration(i) * time.Second)})
	}
	return all
}

func TestFilesOutput(t *testing.T) {
	values, err := filesOutput(said("begin", "read\t5e6", "found\t7", "end\t3.01"))
	if err != nil || values["read"] != 5e6 || values["found"] != 7 {
		t.Errorf("%v, %v", values, err)
	}
	for _, bad := range [][]saying{
		nil,
		said("begin"),
		said("read\t1", "end\t1"),
		said("begin", "read\t1"),
		said("begin", "read", "end\t2"),
		said("begin", "read\t-1", "end\t2"),
		said("begin", "read\t1", "end\t0.5"), // a clock that is slow
		said("begin", "read\t1", "end\t9"),
	} {
		if _, err := filesOutput(bad); err == nil {
			t.Errorf("%v is taken", bad)
		}
	}
}

// The archive has what its maker says.
func TestMakeData(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	found, err := makeData(t.Context(), dir, 1<<20, 120)
	if err != nil || found != 120+3+1 {
		t.Errorf("%d files and directories, %v", found, err)
	}
	if st, err := os.Stat(filepath.Join(dir, load.Sequential)); err != nil || st.Size() != 1<<20 {
		t.Errorf("%v, %v", st, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := makeData(ctx, filepath.Join(t.TempDir(), "data"), 1, 10); !errors.Is(err, context.Canceled) {
		t.Errorf("after an interrupt: %v", err)
	}
}

// readAll skips what is not there.
func TestReadAll(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sparse")
	err := newFile(path, func(w io.Writer) error {
		f := w.(*os.File)
		if _, err := f.WriteAt([]byte("x"), 1<<40); err != nil && !errors.Is(err, unix.EFBIG) {
			return err
		}
		_, err := f.WriteAt([]byte("y"), 0)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := readAll(path); err != nil {
		t.Error(err)
	}
}

func TestKVMState(t *testing.T) {
	for text, want := range map[string]string{
		`{"verdicts":[{"name":"cpu","ok":false},{"name":"kvm","ok":true}]}`: "works",
		`{"verdicts":[{"name":"cpu","ok":true},{"name":"kvm","ok":false}]}`: "does not work",
		`{"verdicts":[{"name":"cpu","ok":true}]}`:                           "",
		`no container can run`: "",
	} {
		if got := kvmState(text); got != want {
			t.Errorf("%s: %q, want %q", text, got, want)
		}
	}
}
