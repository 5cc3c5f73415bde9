package qemu

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// qcow2Header is the header of an image without anything.
func qcow2Header(version uint32) []byte {
	h := make([]byte, 104)
	copy(h, "QFI\xfb")
	binary.BigEndian.PutUint32(h[4:], version)
	return h
}

func TestCheckQCOW2(t *testing.T) {
	t.Parallel()
	backing, external := qcow2Header(2), qcow2Header(3)
	binary.BigEndian.PutUint64(backing[8:], 104)
	binary.BigEndian.PutUint64(external[72:], 4)
	for name, c := range map[string]struct {
		header []byte
		want   string // empty: fine
	}{
		"version 2":     {qcow2Header(2)[:72], ""},
		"version 3":     {qcow2Header(3), ""},
		"backing file":  {backing, "backing file"},
		"data file":     {external, "in another file"},
		"short":         {qcow2Header(3)[:80], "version"},
		"version 1":     {qcow2Header(1), "version is 1"},
		"raw":           {make([]byte, 4096), "no qcow2 image"},
		"empty":         {nil, "no qcow2 image"},
		"no file's end": {qcow2Header(2)[:71], "no qcow2 image"},
	} {
		path := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(path, c.header, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		err = checkQCOW2(f)
		f.Close()
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

func FuzzDeviceEvent(f *testing.F) {
	f.Add([]byte(`{"device": "disk-1", "path": "/machine/peripheral/disk-1"}`))
	f.Fuzz(func(_ *testing.T, data []byte) { _ = deviceEvent(data) })
}
