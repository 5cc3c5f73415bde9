package spawn

import (
	"errors"
	"os"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestBox: what a child reads lies in its box, all of it: it has no heap.
func TestBox(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = r.Close(), w.Close() }()
	for name, s := range map[string]*Spec{
		"program": {
			Path: "/bin/true", Args: []string{"true"}, Env: []string{"A=b"}, Dir: "/", Setns: []*os.File{r, w},
			Credential:   &Credential{Groups: []uint32{1, 2, 3}},
			Capabilities: &Capabilities{Bounding: 1},
			Seccomp:      &Seccomp{Filter: make([]byte, 4096*sockFilterSize)},
		},
		"late":  {Hold: true, ProcFS: &ProcFS{Source: strings.Repeat("s", 4095), Flags: []string{"ro"}, Data: []string{"hidepid=2", "subset"}}},
		"large": {Path: "/bin/true", Args: []string{strings.Repeat("x", 8<<20)}, Credential: &Credential{Groups: make([]uint32, 1<<16)}},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := newBox(s.room())
			if err != nil {
				t.Fatal(err)
			}
			defer b.free()
			p, err := newParams(s, b)
			if err != nil {
				t.Fatal(err)
			}
			first := uintptr(unsafe.Pointer(&b.mem[0]))
			end := first + uintptr(len(b.mem))
			var walk func(v reflect.Value, path string)
			walk = func(v reflect.Value, path string) {
				switch v.Kind() {
				case reflect.Struct:
					for i := range v.NumField() {
						walk(v.Field(i), path+"."+v.Type().Field(i).Name)
					}
				case reflect.Array:
					for i := range v.Len() {
						walk(v.Index(i), path)
					}
				case reflect.Slice:
					if at := v.Pointer(); v.Cap() > 0 && (at < first || at+uintptr(v.Cap())*v.Type().Elem().Size() > end) {
						t.Errorf("%s is not in the box", path)
					}
					if v.Type().Elem().Kind() == reflect.Struct {
						for i := range v.Len() {
							walk(v.Index(i), path)
						}
					}
				case reflect.Pointer:
					if at := v.Pointer(); at != 0 && (at < first || at >= end) {
						t.Errorf("%s points out of the box", path)
					}
				case reflect.String, reflect.Map, reflect.Interface, reflect.Func, reflect.Chan:
					t.Errorf("%s is a %s", path, v.Kind())
				}
			}
			walk(reflect.ValueOf(p).Elem(), "params")
		})
	}
}

func TestBoxIsFull(t *testing.T) {
	b, err := newBox(0)
	if err != nil {
		t.Fatal(err)
	}
	defer b.free()
	if _, err := boxed[byte](b, stackSize); err != nil {
		t.Error(err)
	}
	if _, err := boxed[uint64](b, 1); !errors.Is(err, unix.E2BIG) {
		t.Errorf("more than there is: %v", err)
	}
	if _, err := boxedString(b, "a\x00b"); !errors.Is(err, unix.EINVAL) {
		t.Errorf("a zero byte in a string: %v", err)
	}
}

// TestHeapIsExcluded: the kernel marks the heap as not to be copied by a fork.
func TestHeapIsExcluded(t *testing.T) {
	here := new(uintptr)
	*here = uintptr(unsafe.Pointer(here))
	excludeHeap()
	maps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Skip(err)
	}
	if !excluded(t, maps, *here) {
		t.Error("it is copied")
	}
}

// excluded looks for the flag "dc" (do not copy on fork) of the mapping with an
// address in an smaps file.
func excluded(t *testing.T, smaps []byte, address uintptr) bool {
	t.Helper()
	in := false
	for l := range strings.Lines(string(smaps)) {
		if f := strings.Fields(l); len(f) > 0 && strings.Contains(f[0], "-") {
			a, b, _ := strings.Cut(f[0], "-")
			first, aerr := strconv.ParseUint(a, 16, 64)
			end, berr := strconv.ParseUint(b, 16, 64)
			if err := errors.Join(aerr, berr); err != nil {
				t.Fatal(err)
			}
			in = uintptr(first) <= address && address < uintptr(end)
		} else if in && f[0] == "VmFlags:" {
			return strings.Contains(l, " dc")
		}
	}
	t.Error("it is mapped nowhere")
	return false
}
