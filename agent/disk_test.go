package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

func TestStorage(t *testing.T) {
	t.Parallel()
	request := func() *agentv1.CreateContainerRequest {
		return &agentv1.CreateContainerRequest{
			ContainerId: "c",
			Rootfs:      &agentv1.Rootfs{ShareTag: "runv", SharePath: "c/rootfs", Overlay: true},
			Devices: []*agentv1.Device{
				{Path: "/dev/a", Type: "b", Major: 253, Minor: 9},
				{Path: "/dev/b", Type: "b", Major: 253, Minor: 9},
				{Path: "/dev/null", Type: "c", Major: 1, Minor: 3},
			},
			Resources: &agentv1.Resources{Devices: []*agentv1.DeviceRule{{Type: "a", Major: -1, Minor: -1, Access: "rwm"}}},
			Disks: []*agentv1.Disk{
				{Serial: "runv-1", Type: "ext4"},
				{Serial: "runv-2", Devices: []string{"/dev/a", "/dev/b"}, Access: "rm"},
			},
		}
	}
	f := &fakeSystem{}
	a := &Agent{system: f}
	req := request()
	undo, err := a.openStorage(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if f.disks != 2 || f.overlays != 1 {
		t.Errorf("%d disks, %d overlays", f.disks, f.overlays)
	}
	want := request()
	want.Rootfs.ShareTag, want.Rootfs.SharePath = agentv1.DiskTag, "c"
	for _, d := range want.Devices[:2] {
		d.Major, d.Minor = 8, 16
	}
	want.Resources.Devices = append(want.Resources.Devices, &agentv1.DeviceRule{Allow: true, Type: "b", Major: 8, Minor: 16, Access: "rm"})
	if !proto.Equal(req, want) {
		t.Errorf("the request is\n%v, want\n%v", req, want)
	}
	if err := undo(); err != nil || f.disks != 0 || f.overlays != 0 {
		t.Errorf("%v; %d disks and %d overlays are left", err, f.disks, f.overlays)
	}
	for _, fail := range []string{"disks", "overlay"} {
		f := &fakeSystem{fail: fail}
		if _, err := (&Agent{system: f}).openStorage(t.Context(), request()); err == nil || f.disks != 0 || f.overlays != 0 {
			t.Errorf("%s fails: %v; %d disks and %d overlays are left", fail, err, f.disks, f.overlays)
		}
	}
	for want, change := range map[string]func(r *agentv1.CreateContainerRequest){
		"disks[0].serial":  func(r *agentv1.CreateContainerRequest) { r.Disks[0].Serial = "../x" },
		"disks[1].serial":  func(r *agentv1.CreateContainerRequest) { r.Disks[1].Serial = "runv-1" },
		"disks[0].type":    func(r *agentv1.CreateContainerRequest) { r.Disks[0].Type = "nfs" },
		"disks[1].access":  func(r *agentv1.CreateContainerRequest) { r.Disks[1].Access = "rx" },
		"disks[1].devices": func(r *agentv1.CreateContainerRequest) { r.Disks[1].Devices = []string{"/dev/null"} },
		"disks has":        func(r *agentv1.CreateContainerRequest) { r.Disks = make([]*agentv1.Disk, maxContainerDisks+1) },
		"rootfs":           func(r *agentv1.CreateContainerRequest) { r.Rootfs.SharePath = "c:d" },
	} {
		r := request()
		change(r)
		if _, err := a.openStorage(t.Context(), r); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("got %v, want an error of %s", err, want)
		}
	}
}

func TestFindDisks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	page := func(serial string) string { return "\x00\x80\x00" + string(rune(len(serial))) + serial }
	for name, files := range map[string]map[string]string{
		"sda":   {"device/vpd_pg80": page("runv-1"), "size": "2048\n"},
		"sdb":   {"device/vpd_pg80": page("  runv-2 "), "size": "1\n"},
		"sdc":   {"device/vpd_pg80": page("empty"), "size": "0\n"},
		"sdd":   {"device/vpd_pg80": "\x00\x80\xff\xffshort", "size": "1\n"},
		"sde":   {"size": "1\n"},
		"loop0": {"device/vpd_pg80": page("loop"), "size": "1\n"},
	} {
		for f, text := range files {
			p := filepath.Join(dir, name, f)
			if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	got, err := findDisks(dir)
	if err != nil || len(got) != 2 || got["runv-1"] != "sda" || got["runv-2"] != "sdb" {
		t.Errorf("%v, %v", got, err)
	}
}

func FuzzUnitSerial(f *testing.F) {
	f.Add([]byte("\x00\x80\x00\x03abc"))
	f.Fuzz(func(t *testing.T, page []byte) {
		if s, ok := unitSerial(page); ok && !validSerial(s) {
			t.Errorf("%q", s)
		}
	})
}
