package hypervisor

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"
)

func TestDifference(t *testing.T) {
	for name, test := range map[string]struct {
		saved, now string
		want       []string
	}{
		"same":         {"a: 1\nb: 2\n", "a: 1\nb: 2\n", nil},
		"value":        {"a: 1\nb: 2\n", "a: 1\nb: 3\n", []string{`b: saved with "2", now "3"`}},
		"more":         {"a: 1\n", "a: 1\nb: 2\n", []string{`b: saved without, now "2"`}},
		"less":         {"a: 1\nb: 2\n", "a: 1\n", []string{`b: saved with "2", now without`}},
		"order":        {"a: 1\nb: 2\n", "b: 2\na: 1\n", []string{"the same lines in another order"}},
		"optional new": {"a: 1\n", "a: 1\n+b: 2\n", nil},
		"optional old": {"a: 1\n+b: 2\n", "a: 1\n", []string{`+b: saved with "2", now without`}},
		"colon":        {"-device: a: b\n", "-device: a: c\n", []string{`-device: saved with "a: b", now "a: c"`}},
	} {
		t.Run(name, func(t *testing.T) {
			if got := Difference(test.saved, test.now); !reflect.DeepEqual(got, test.want) {
				t.Errorf("got %q, want %q", got, test.want)
			}
			err := Mismatch(test.saved, test.now)
			if (err == nil) != (test.want == nil) || (err != nil && !errors.Is(err, ErrMismatch)) {
				t.Errorf("error is %v", err)
			}
		})
	}
}

func TestCopySparse(t *testing.T) {
	const size = 1 << 20
	src, err := os.OpenFile(filepath.Join(t.TempDir(), "src"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	want := make([]byte, size)
	copy(want[5000:], "five thousand")
	copy(want[300<<10:], "beyond a chunk")
	want[size-1] = 7
	for _, p := range []int{4096, 300 << 10, size - 4096} {
		if _, err := src.WriteAt(want[p:p+4096], int64(p)); err != nil {
			t.Fatal(err)
		}
	}
	// Zeros that are no hole.
	if _, err := src.WriteAt(make([]byte, 64<<10), 512<<10); err != nil {
		t.Fatal(err)
	}
	dst, err := NewMemory("test", size)
	if err != nil {
		t.Fatal(err)
	}
	defer dst.Close()
	if err := CopySparse(dst, src, size, nil); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, size)
	if _, err := dst.ReadAt(got, 0); err != nil || string(got) != string(want) {
		t.Errorf("the copy differs (%v)", err)
	}
	if err := CheckSealed(dst); !errors.Is(err, ErrNotSealed) {
		t.Errorf("before the seal: %v", err)
	}
	if err := SealMemory(dst); err != nil {
		t.Fatal(err)
	}
	if err := CheckSealed(dst); err != nil {
		t.Error(err)
	}
	if _, err := dst.WriteAt([]byte{1}, 0); err == nil {
		t.Error("sealed memory was written to")
	}
	if err := CheckSealed(src); !errors.Is(err, ErrNotSealed) {
		t.Errorf("a file: %v", err)
	}
	stop := errors.New("stop")
	if err := CopySparse(dst, src, size, func() error { return stop }); !errors.Is(err, stop) {
		t.Errorf("stopped copy: %v", err)
	}
}
