package ocispec

import (
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

func TestDeviceAccess(t *testing.T) {
	t.Parallel()
	n := func(v int64) *int64 { return &v }
	deny := specs.LinuxDeviceCgroup{Access: "rwm"}
	for _, c := range []struct {
		rules []specs.LinuxDeviceCgroup
		want  string
	}{
		{nil, "rwm"},
		{[]specs.LinuxDeviceCgroup{deny}, ""},
		{[]specs.LinuxDeviceCgroup{deny, {Allow: true, Type: "b", Major: n(7), Minor: n(1), Access: "r"}}, "r"},
		{[]specs.LinuxDeviceCgroup{deny, {Allow: true, Type: "b", Major: n(7), Minor: n(-1), Access: "rw"}}, "rw"},
		{[]specs.LinuxDeviceCgroup{deny, {Allow: true, Type: "b", Major: n(7), Minor: n(2), Access: "rw"}}, ""},
		{[]specs.LinuxDeviceCgroup{deny, {Allow: true, Type: "c", Access: "rwm"}}, ""},
		{[]specs.LinuxDeviceCgroup{{Allow: true, Type: "a", Access: "rwm"}, {Type: "b", Major: n(7), Access: "w"}}, "rm"},
	} {
		if got := deviceAccess(c.rules, 7, 1); got != c.want {
			t.Errorf("%+v: %q, want %q", c.rules, got, c.want)
		}
	}
}

// One device under two paths is one disk; serial numbers are the agent's kind.
func TestDisks(t *testing.T) {
	t.Parallel()
	d := &disks{id: strings.Repeat("x", 1024)}
	for _, p := range []string{"/dev/a", "/dev/b/../b"} {
		if !d.device(&specs.LinuxDevice{Path: p, Type: "b", Major: 7, Minor: 1}, nil, "/dev/loop1", "f") {
			t.Errorf("%s is no disk", p)
		}
	}
	if len(d.host) != 1 || len(d.guest) != 1 || strings.Join(d.guest[0].Devices, " ") != "/dev/a /dev/b" {
		t.Errorf("%v %v", d.host, d.guest)
	}
	o := &Options{Bundle: "/b"}
	m, err := d.mount(&specs.Mount{Type: "ext4", Source: "image", Destination: "v", Options: []string{"ro", "noatime", "noload", "x-runv.format=qcow2"}}, "mounts[0]", o)
	if err != nil {
		t.Fatal(err)
	}
	host, guest := d.host[1], d.guest[1]
	if host.Source != "/b/image" || !host.ReadOnly || host.Format != "qcow2" || host.Serial != guest.Serial || host.Serial == d.host[0].Serial || len(host.Serial) > 36 {
		t.Errorf("host: %v", host)
	}
	if !guest.ReadOnly || strings.Join(guest.Flags, " ") != "ro" || strings.Join(guest.Data, " ") != "noload" {
		t.Errorf("guest: %v", guest)
	}
	if m.ShareTag != agentv1.DiskTag || m.SharePath != guest.Serial || m.Destination != "/v" {
		t.Errorf("mount: %v", m)
	}
	if _, err := d.mount(&specs.Mount{Type: "erofs", Source: "image", Destination: "/v"}, "mounts[1]", o); err != nil || !d.host[2].ReadOnly {
		t.Errorf("erofs: %v, %v", err, d.host[2])
	}
	for want, m := range map[string]specs.Mount{
		"mounts[0].source: is missing":                              {Type: "ext4"},
		"mounts[0].options[0]: remount":                             {Type: "ext4", Source: "/i", Options: []string{"remount"}},
		"mounts[0].options: tmpcopyup":                              {Type: "ext4", Source: "/i", Options: []string{"tmpcopyup"}},
		"mounts[0].options: \"x-runv.format=vmdk\" names no format": {Type: "ext4", Source: "/i", Options: []string{"x-runv.format=vmdk"}},
		"mounts[0].options: \"x-runv.other\" is not one of runv's":  {Type: "ext4", Source: "/i", Options: []string{"x-runv.other"}},
	} {
		if _, err := d.mount(&m, "mounts[0]", o); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

// A root file system that is given as a mount takes the place of root.path.
func TestRootfsDisk(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		disk RootfsDisk
		ro   bool
	}{
		{RootfsDisk{Type: "ext4", Source: "/dev/x"}, false},
		{RootfsDisk{Type: "ext4", Source: "/dev/x", ReadOnly: true}, true},
		{RootfsDisk{Type: "erofs", Source: "/image"}, true},
	} {
		req, err := Translate(Example(false), Options{ID: "c", Bundle: "/b", Rootfs: &c.disk})
		if err != nil {
			t.Fatal(err)
		}
		if len(req.Disks) != 1 || req.Disks[0].Source != c.disk.Source || req.Disks[0].ReadOnly != c.ro || req.Disks[0].Format != "" {
			t.Errorf("%+v: host's disks %v", c.disk, req.Disks)
		}
		guest := req.Container.Disks
		if len(guest) != 1 || guest[0].Type != c.disk.Type || guest[0].ReadOnly != c.ro || strings.Contains(strings.Join(guest[0].Flags, " "), "ro") != c.ro {
			t.Errorf("%+v: guest's disks %v", c.disk, guest)
		}
		if r := req.Container.Rootfs; r.ShareTag != agentv1.DiskTag || r.SharePath != guest[0].Serial {
			t.Errorf("%+v: %v", c.disk, r)
		}
		for _, m := range req.Mounts {
			if m.Field == "root.path" {
				t.Errorf("%+v: root.path is shared as well", c.disk)
			}
		}
	}
	s := Example(false)
	s.Annotations = map[string]string{AnnotationRootfsType: "ext4"}
	if _, err := Translate(s, Options{ID: "c", Bundle: "/b", Rootfs: &RootfsDisk{Type: "ext4", Source: "/dev/x"}}); err == nil || !strings.Contains(err.Error(), AnnotationRootfsType) {
		t.Errorf("two root file systems: %v", err)
	}
}

func TestParseStorage(t *testing.T) {
	t.Parallel()
	for key, bad := range map[string]string{AnnotationRootfsType: "/etc/shadow", AnnotationOverlay: "host"} {
		if _, err := parseStorage(map[string]string{key: bad}); err == nil || !strings.Contains(err.Error(), key) {
			t.Errorf("%s=%s: %v", key, bad, err)
		}
	}
	req, err := parseStorage(map[string]string{AnnotationRootfsType: "erofs", AnnotationOverlay: "guest"})
	if err != nil || req.rootfsType != "erofs" || !req.overlay {
		t.Errorf("%+v, %v", req, err)
	}
}
