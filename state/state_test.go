package state

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func TestValidateID(t *testing.T) {
	for id, ok := range map[string]bool{
		"a":                                true,
		"A-b_c.d+9":                        true,
		".hidden":                          true,
		"..x":                              true,
		strings.Repeat("x", MaxIDLength):   true,
		"":                                 false,
		".":                                false,
		"..":                               false,
		"a/b":                              false,
		"../x":                             false,
		"a b":                              false,
		"~x":                               false,
		"ä":                                false,
		"x\n":                              false,
		strings.Repeat("x", MaxIDLength+1): false,
	} {
		err := ValidateID(id)
		if (err == nil) != ok {
			t.Errorf("ValidateID(%q) = %v", id, err)
		}
		if err != nil && !errors.Is(err, ErrInvalidID) {
			t.Errorf("ValidateID(%q) = %v, does not wrap ErrInvalidID", id, err)
		}
	}
}

func testRecord(id string) *Record {
	return &Record{ID: id, SandboxID: id, Status: Created, Created: time.Unix(1, 2).UTC(), Bundle: "/b"}
}

// fill sets everything below v to something other than its zero value.
func fill(t *testing.T, v reflect.Value, path string) {
	t.Helper()
	if tm, ok := v.Addr().Interface().(*time.Time); ok {
		*tm = time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
		return
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString("value-of-" + path)
	case reflect.Int, reflect.Int64:
		v.SetInt(7)
	case reflect.Uint64, reflect.Uint32, reflect.Uint16:
		v.SetUint(9)
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Struct:
		for i := range v.NumField() {
			f := v.Type().Field(i)
			if !f.IsExported() {
				t.Fatalf("%s.%s is not exported and would be lost", path, f.Name)
			}
			fill(t, v.Field(i), path+"."+f.Name)
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		for i := range 2 {
			fill(t, v.Index(i), path)
		}
	case reflect.Map:
		e := reflect.New(v.Type().Elem()).Elem()
		fill(t, e, path)
		k := reflect.New(v.Type().Key()).Elem()
		fill(t, k, path)
		v.Set(reflect.MakeMap(v.Type()))
		v.SetMapIndex(k, e)
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(t, v.Elem(), path)
	default:
		t.Fatalf("%s: the test does not know kind %v", path, v.Kind())
	}
}

func TestEveryFieldSurvives(t *testing.T) {
	var r Record
	fill(t, reflect.ValueOf(&r).Elem(), "r")
	r.Schema, r.ID, r.SandboxID, r.Status, r.BootID = Schema, "c1", "pod1", Paused, BootID()

	s := Open(filepath.Join(t.TempDir(), "root"))
	if err := s.Reserve("c1"); err != nil {
		t.Fatal(err)
	}
	if err := s.Save(&r); err != nil {
		t.Fatal(err)
	}
	got, err := s.Load("c1")
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, &r) {
		t.Errorf("loaded %+v\nsaved  %+v", got, &r)
	}
}

// A record of another boot names nothing that there is; one that does not tell is of
// this boot.
func TestBootID(t *testing.T) {
	if len(BootID()) != 36 {
		t.Fatalf("the boot id is %q", BootID())
	}
	written := testRecord("x")
	written.StandIn, written.Supervisor, written.VM = Self(), Self(), Self()
	written.NetworkNamespace, written.Cgroups = "/run/netns/x", []string{"/sys/fs/cgroup/x"}
	b, err := written.Encode()
	if err != nil {
		t.Fatal(err)
	}
	const field = `  "bootId": "`
	line := []byte(field + BootID() + "\",\n")
	if !bytes.Contains(b, line) {
		t.Fatalf("no boot id is written: %s", b)
	}
	for name, tc := range map[string]struct {
		line string
		gone bool
	}{
		"this boot":       {line: string(line)},
		"an older record": {},
		"another boot":    {line: field + "00000000-0000-4000-8000-000000000000\",\n", gone: true},
	} {
		r, err := Decode(bytes.Replace(b, line, []byte(tc.line), 1))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		want := Created
		if tc.gone {
			want = Stopped
		}
		if got := r.Current(); got != want || r.Status != Created {
			t.Errorf("%s: it is %s and was %s, want %s and %s", name, got, r.Status, want, Created)
		}
		none := r.StandIn == ProcessRef{} && r.Supervisor == ProcessRef{} && r.VM == ProcessRef{} && r.NetworkNamespace == "" && r.Cgroups == nil
		all := r.StandIn == Self() && r.Supervisor == Self() && r.VM == Self() && r.NetworkNamespace != "" && len(r.Cgroups) == 1
		if none != tc.gone || all == tc.gone {
			t.Errorf("%s: it names %+v", name, r)
		}
	}
}

func TestDecodeErrors(t *testing.T) {
	good, err := testRecord("x").Encode()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		in, want string
		is       error
	}{
		"empty":          {"", "unexpected end", nil},
		"no schema":      {`{}`, "no schema number", nil},
		"other schema":   {`{"schema":2,"future":[]}`, "2, want 1", ErrSchema},
		"unknown field":  {`{"schema":1,"surprise":1}`, "surprise", nil},
		"wrong type":     {`{"schema":1,"id":5}`, "id", nil},
		"bad id":         {`{"schema":1,"id":"../x"}`, "invalid container ID", ErrInvalidID},
		"bad sandbox id": {`{"schema":1,"id":"x","sandboxId":""}`, "sandboxId", ErrInvalidID},
		"bad status":     {`{"schema":1,"id":"x","sandboxId":"x","status":"dancing"}`, "dancing", nil},
		"trailing":       {string(good) + "{}", "", nil},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Decode([]byte(c.in))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want something with %q", err, c.want)
			}
			if c.is != nil && !errors.Is(err, c.is) {
				t.Errorf("error %v does not wrap %v", err, c.is)
			}
		})
	}
}

func FuzzDecode(f *testing.F) {
	r := testRecord("seed")
	r.PoststopHooks = []specs.Hook{{Path: "/x", Args: []string{"x"}}}
	b, err := r.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"schema":9}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := Decode(b)
		if err != nil {
			return
		}
		again, err := r.Encode()
		if err != nil {
			// Time's own encoder refuses years beyond 9999 and odd zones.
			t.Skip(err)
		}
		r2, err := Decode(again)
		if err != nil {
			t.Fatalf("what Encode wrote does not decode: %v", err)
		}
		once, _ := r2.Encode()
		if !bytes.Equal(once, again) {
			t.Fatalf("encoding is not stable:\n%s\n%s", again, once)
		}
	})
}

func TestReserveAndRemove(t *testing.T) {
	s := Open(filepath.Join(t.TempDir(), "a", "root"))
	if rs, err := s.List(); len(rs) != 0 || err != nil {
		t.Fatalf("empty store lists %v, %v", rs, err)
	}
	if _, err := s.Load("x"); !errors.Is(err, ErrNotFound) {
		t.Errorf("Load: %v, want ErrNotFound", err)
	}
	if err := s.Reserve("x"); err != nil {
		t.Fatal(err)
	}
	fi, err := os.Stat(s.Root())
	if err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("root has mode %v, %v", fi.Mode(), err)
	}
	if err := s.Reserve("x"); !errors.Is(err, ErrExists) {
		t.Errorf("second Reserve: %v, want ErrExists", err)
	}
	if _, err := s.Load("x"); !errors.Is(err, ErrHalfMade) {
		t.Errorf("Load: %v, want ErrHalfMade", err)
	}
	if err := os.MkdirAll(filepath.Join(s.Dir("x"), "share", "deep", "er"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/", filepath.Join(s.Dir("x"), "share", "link")); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove("x"); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove("x"); !errors.Is(err, ErrNotFound) {
		t.Errorf("second Remove: %v, want ErrNotFound", err)
	}
	es, err := os.ReadDir(s.Root())
	if err != nil || len(es) != 0 {
		t.Errorf("left: %v, %v", es, err)
	}
	if err := s.Save(testRecord("x")); !errors.Is(err, ErrNotFound) {
		t.Errorf("Save after Remove: %v, want ErrNotFound", err)
	}
}

func TestListIsTolerant(t *testing.T) {
	s := Open(t.TempDir())
	for _, id := range []string{"b", "a", "half", "broken"} {
		if err := s.Reserve(id); err != nil {
			t.Fatal(err)
		}
	}
	for _, id := range []string{"a", "b"} {
		if err := s.Save(testRecord(id)); err != nil {
			t.Fatal(err)
		}
	}
	for name, data := range map[string]string{"broken/state.json": "{", "a-file": "x", "half/.state-1": "{"} {
		if err := os.WriteFile(filepath.Join(s.Root(), name), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(s.Root(), "~gone"), 0o700); err != nil {
		t.Fatal(err)
	}
	rs, err := s.List()
	if len(rs) != 2 || rs[0].ID != "a" || rs[1].ID != "b" {
		t.Errorf("listed %v", rs)
	}
	if err == nil || !strings.Contains(err.Error(), `"broken"`) {
		t.Errorf("error %v, want one about broken", err)
	}
	if n, err := s.RemoveLeftovers(); n != 1 || err != nil {
		t.Errorf("RemoveLeftovers = %d, %v", n, err)
	}
}

func TestLock(t *testing.T) {
	s := Open(t.TempDir())
	if _, err := s.Lock("x"); !errors.Is(err, ErrNotFound) {
		t.Errorf("Lock: %v, want ErrNotFound", err)
	}
	if err := s.Reserve("x"); err != nil {
		t.Fatal(err)
	}
	unlock, err := s.Lock("x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.TryLock("x"); !errors.Is(err, ErrLocked) {
		t.Errorf("TryLock: %v, want ErrLocked", err)
	}
	old, err := s.OpenDir("x")
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()

	// A waiter on a container that is removed and made anew gets the new one.
	var wg sync.WaitGroup
	wg.Go(func() {
		unlock, err := s.Lock("x")
		for errors.Is(err, ErrNotFound) { // it came between Remove and Reserve
			unlock, err = s.Lock("x")
		}
		if err != nil {
			t.Errorf("waiting Lock: %v", err)
			return
		}
		defer unlock()
		if s.Is("x", old) {
			t.Error("the lock is on the removed container")
		}
	})
	if err := s.Remove("x"); err != nil {
		t.Fatal(err)
	}
	if err := s.Reserve("x"); err != nil {
		t.Fatal(err)
	}
	unlock()
	wg.Wait()
}

func TestRemoveStopsAtMounts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts a tmpfs")
	}
	s := Open(t.TempDir())
	if err := s.Reserve("x"); err != nil {
		t.Fatal(err)
	}
	vol := filepath.Join(s.Dir("x"), "share", "vol")
	if err := os.MkdirAll(vol, 0o700); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(s.Root(), unix.O_PATH, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Mount("tmpfs", vol, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("needs the right to mount: %v", err)
	}
	t.Cleanup(func() {
		ms, _ := filepath.Glob(filepath.Join(s.Root(), "*", "share", "vol"))
		for _, m := range ms {
			_ = unix.Unmount(m, unix.MNT_DETACH)
		}
	})
	if err := os.WriteFile(filepath.Join(vol, "precious"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	err = s.Remove("x")
	if err == nil || !strings.Contains(err.Error(), "mounted") {
		t.Fatalf("Remove: %v, want a refusal", err)
	}
	ms, _ := filepath.Glob(filepath.Join(s.Root(), "*", "share", "vol", "precious"))
	if len(ms) != 1 {
		t.Fatal("the file on the mounted file system is gone")
	}
}

func TestProcessRef(t *testing.T) {
	if !Self().Alive() || Self().StartTime == 0 {
		t.Fatalf("Self() = %+v is not alive", Self())
	}
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ref, err := RefOf(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if !ref.Alive() {
		t.Error("a running process is not alive")
	}
	if (ProcessRef{Pid: ref.Pid, StartTime: ref.StartTime + 1}).Alive() {
		t.Error("another process with the same pid is alive")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := ref.Wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Wait with an ended context: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- ref.Wait(t.Context()) }()
	_ = in.Close()
	if err := <-done; err != nil {
		t.Errorf("Wait: %v", err)
	}
	if ref.Alive() {
		t.Error("a zombie is alive")
	}
	_ = cmd.Wait()
	if _, err := ref.Open(); !errors.Is(err, ErrGone) {
		t.Errorf("Open: %v, want ErrGone", err)
	}
	if err := ref.Signal(unix.SIGTERM); !errors.Is(err, ErrGone) {
		t.Errorf("Signal: %v, want ErrGone", err)
	}
	if err := ref.Wait(t.Context()); err != nil {
		t.Errorf("Wait on a reaped process: %v", err)
	}
}

func TestCurrent(t *testing.T) {
	gone := ProcessRef{Pid: os.Getpid(), StartTime: 1}
	for _, c := range []struct {
		status              Status
		standIn, supervisor ProcessRef
		want                Status
	}{
		{Running, Self(), Self(), Running},
		{Paused, Self(), Self(), Paused},
		{Running, gone, Self(), Stopped},
		{Created, Self(), gone, Stopped},
		{Creating, ProcessRef{}, Self(), Stopped},
		{Stopped, Self(), Self(), Stopped},
	} {
		r := &Record{Status: c.status, StandIn: c.standIn, Supervisor: c.supervisor}
		if got := r.Current(); got != c.want {
			t.Errorf("%+v: Current() = %s, want %s", c, got, c.want)
		}
	}
}

func TestParseStat(t *testing.T) {
	tail := " S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20"
	for _, c := range []struct {
		in    string
		st    byte
		start uint64
		ok    bool
	}{
		{"12 (a) b) (x)" + tail, 'S', 4711, true},
		{"12 (a)" + strings.Replace(tail, " S ", " Z ", 1), 'Z', 4711, true},
		{"", 0, 0, false},
		{"12 (a) S 1 2", 0, 0, false},
		{"12 (a)" + strings.Replace(tail, "4711", "-1", 1), 0, 0, false},
	} {
		st, start, err := parseStat([]byte(c.in))
		if st != c.st || start != c.start || (err == nil) != c.ok {
			t.Errorf("parseStat(%q) = %c, %d, %v", c.in, st, start, err)
		}
	}
}

func TestConcurrentSaveAndLoad(t *testing.T) {
	s := Open(t.TempDir())
	if err := s.Reserve("x"); err != nil {
		t.Fatal(err)
	}
	if err := s.Save(testRecord("x")); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 20 {
				if err := s.Save(testRecord("x")); err != nil {
					t.Error(err)
				}
				if _, err := s.Load("x"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	es, _ := os.ReadDir(s.Dir("x"))
	if len(es) != 1 {
		t.Errorf("left beside the record: %v", es)
	}
}

// threadEnv makes the test binary a process whose first thread has ended, until its
// standard input does.
const threadEnv = "RUNV_TEST_STATE_THREAD"

func init() {
	if os.Getenv(threadEnv) == "" {
		return
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	// An init function is called on the first thread, which it keeps.
	_, _, _ = unix.RawSyscall(unix.SYS_EXIT, 0, 0, 0)
}

// A process whose first thread has ended is a zombie for /proc, and not for who
// waits for its files to be closed.
func TestWaitForAllThreads(t *testing.T) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), threadEnv+"=1")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ref, err := RefOf(cmd.Process.Pid)
	for err == nil { // until the thread has ended
		_, err = RefOf(ref.Pid)
		runtime.Gosched()
	}
	if ref.Pid == 0 {
		_, start, err := readStat(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		ref = ProcessRef{Pid: cmd.Process.Pid, StartTime: start}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := ref.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("it was not waited for: %v", err)
	}
	stdin.Close()
	if err := ref.Wait(t.Context()); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait()
}
