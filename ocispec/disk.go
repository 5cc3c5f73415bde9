package ocispec

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
)

// diskFileSystems are the types that a container can have on a disk: those that
// the guest's kernel has.
var diskFileSystems = []string{"ext4", "erofs", "squashfs"}

// DiskFileSystem tells whether a container can have a file system of a type on a
// disk.
func DiskFileSystem(typ string) bool { return slices.Contains(diskFileSystems, typ) }

// readOnlyFileSystem tells whether nobody can write to a file system of a type.
func readOnlyFileSystem(typ string) bool { return typ == "erofs" || typ == "squashfs" }

// formatOption begins the one mount option that is about the image file. Options
// that begin with "x-" are not for a kernel (mount(8)).
const formatOption = "x-runv.format="

// diskSerial is the serial number of a container's n-th disk; no other container
// of the pod has it.
func diskSerial(id string, n int) string {
	sum := sha256.Sum256([]byte(id))
	return "runv-" + hex.EncodeToString(sum[:8]) + "-" + strconv.Itoa(n)
}

// disks collects what host and guest are asked to do for a container's disks.
type disks struct {
	id    string
	host  []*supervisorv1.HostDisk
	guest []*agentv1.Disk
}

// add makes a disk of a file of the host.
func (d *disks) add(h *supervisorv1.HostDisk, g *agentv1.Disk) {
	h.Serial = diskSerial(d.id, len(d.host))
	g.Serial, g.ReadOnly = h.Serial, h.ReadOnly
	d.host, d.guest = append(d.host, h), append(d.guest, g)
}

// mount translates a mount with a file system on an image or a block device.
func (d *disks) mount(m *specs.Mount, field string, o *Options) (*agentv1.Mount, error) {
	opts := parseMountOptions(m.Options)
	host := &supervisorv1.HostDisk{Field: field + ".source"}
	var data []string
	for _, opt := range opts.data {
		format, ok := strings.CutPrefix(opt, formatOption)
		switch {
		case !ok && strings.HasPrefix(opt, "x-runv."):
			return nil, fmt.Errorf("%s.options: %q is not one of runv's, want %sraw or %sqcow2", field, clip(opt), formatOption, formatOption)
		case !ok:
			data = append(data, opt)
		case format != "raw" && format != "qcow2":
			return nil, fmt.Errorf("%s.options: %q names no format of an image, want %sraw or %sqcow2", field, clip(opt), formatOption, formatOption)
		default:
			host.Format = format
		}
	}
	switch {
	case m.Source == "":
		return nil, fmt.Errorf("%s.source: is missing, want an image file or a block device with the file system %s", field, m.Type)
	case opts.remount > 0:
		return nil, fmt.Errorf("%s.options[%d]: remount is supported for bind mounts only", field, opts.remount-1)
	case opts.copyUp:
		return nil, fmt.Errorf("%s.options: tmpcopyup is for a tmpfs, and this is %q", field, m.Type)
	case opts.idmap > 0:
		return nil, fmt.Errorf("%s.options[%d]: id-mapped mounts are not supported", field, opts.idmap-1)
	}
	host.Source = o.absolute(m.Source)
	host.ReadOnly = readOnlyFileSystem(m.Type) || slices.Contains(opts.flags, "ro") || (opts.attr.set|opts.rec.set)&unix.MOUNT_ATTR_RDONLY != 0
	guest := &agentv1.Disk{Type: m.Type, Flags: opts.flags, Data: data}
	d.add(host, guest)
	if host.ReadOnly && !slices.Contains(guest.Flags, "ro") {
		guest.Flags = append(guest.Flags, "ro")
	}
	return &agentv1.Mount{
		Destination:  path.Join("/", m.Destination),
		ShareTag:     agentv1.DiskTag,
		SharePath:    guest.Serial,
		AttrSet:      opts.attr.set,
		AttrClear:    opts.attr.clear,
		RecAttrSet:   opts.rec.set,
		RecAttrClear: opts.rec.clear,
		Propagation:  opts.propagation,
	}, nil
}

// rootfs lets the root file system be on an image or block device. Field is what
// names it. It is writable unless the type is not; the container's view of it may
// be read-only none the less.
func (d *disks) rootfs(r *agentv1.Rootfs, disk *RootfsDisk, field string) {
	guest := &agentv1.Disk{Type: disk.Type}
	d.add(&supervisorv1.HostDisk{
		Source: disk.Source, ReadOnly: disk.ReadOnly || readOnlyFileSystem(disk.Type) || r.Overlay, Field: field,
	}, guest)
	if guest.ReadOnly {
		guest.Flags = []string{"ro"}
	}
	r.ShareTag, r.SharePath = agentv1.DiskTag, guest.Serial
}

// device makes a block device of the host a disk of the VM, if the container is
// allowed to use it; false: it is not. Several paths of one device are one disk.
func (d *disks) device(dev *specs.LinuxDevice, rules []specs.LinuxDeviceCgroup, source, field string) bool {
	access := deviceAccess(rules, dev.Major, dev.Minor)
	if !strings.ContainsAny(access, "rw") {
		return false
	}
	for i, h := range d.host {
		if h.Source == source && d.guest[i].Type == "" {
			d.guest[i].Devices = append(d.guest[i].Devices, path.Clean(dev.Path))
			return true
		}
	}
	d.add(&supervisorv1.HostDisk{Source: source, ReadOnly: !strings.Contains(access, "w"), Field: field},
		&agentv1.Disk{Devices: []string{path.Clean(dev.Path)}, Access: access})
	return true
}

// deviceAccess is what rules allow with a block device: of every letter the last
// rule that fits decides, and without any it is allowed.
func deviceAccess(rules []specs.LinuxDeviceCgroup, major, minor int64) string {
	fits := func(n *int64, want int64) bool { return n == nil || *n == -1 || *n == want }
	access := ""
	for _, letter := range "rwm" {
		allowed := true
		for i := range rules {
			r := &rules[i]
			if (r.Type == "" || r.Type == "a" || r.Type == "b") && fits(r.Major, major) && fits(r.Minor, minor) && strings.ContainsRune(r.Access, letter) {
				allowed = r.Allow
			}
		}
		if allowed {
			access += string(letter)
		}
	}
	return access
}
