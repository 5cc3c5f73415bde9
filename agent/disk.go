package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

const (
	// diskWait bounds the time from a call that names a disk to the moment when
	// the kernel has found it.
	diskWait = 20 * time.Second
	// diskRelease bounds how long a file system may take to let go of its disk
	// when nobody can see it any more.
	diskRelease = 5 * time.Second
	// diskStep is how long nothing may happen before something is done about it.
	diskStep = time.Second

	maxContainerDisks = 64
	maxSerial         = 36
)

// diskDir is where the disks of containers are mounted, as if it were a share.
var diskDir = filepath.Join(agentv1.ShareDir, agentv1.DiskTag)

// checkStorage reports what makes no sense in what a container asks of the
// guest's disks, before anything is done about it.
func checkStorage(req *agentv1.CreateContainerRequest) error {
	if len(req.GetDisks()) > maxContainerDisks {
		return invalid(fmt.Sprintf("disks has %d entries, at most %d are allowed", len(req.GetDisks()), maxContainerDisks))
	}
	seen := make(map[string]bool)
	for i, d := range req.GetDisks() {
		bad := func(field, format string, args ...any) error {
			return invalid(fmt.Sprintf("disks[%d].%s: ", i, field) + fmt.Sprintf(format, args...))
		}
		serial := d.GetSerial()
		if !validSerial(serial) || seen[serial] {
			return bad("serial", "%q is no serial number of its own, want 1 to %d letters, digits and dashes", serial, maxSerial)
		}
		seen[serial] = true
		switch d.GetType() {
		case "", "ext4", "erofs", "squashfs":
		default:
			return bad("type", "%q is not a file system for a disk", d.GetType())
		}
		if strings.Trim(d.GetAccess(), "rwm") != "" {
			return bad("access", "is %q, want letters of rwm", d.GetAccess())
		}
		for _, p := range d.GetDevices() {
			if !slices.ContainsFunc(req.GetDevices(), func(dev *agentv1.Device) bool { return dev.GetPath() == p && dev.GetType() == "b" }) {
				return bad("devices", "%q is no block device of the request", p)
			}
		}
	}
	if r := req.GetRootfs(); r.GetOverlay() {
		for _, s := range []string{r.GetShareTag(), r.GetSharePath()} {
			// What the option lowerdir would take for more than a path.
			if !filepath.IsLocal(s) || strings.ContainsAny(s, ":,\\") {
				return invalid(fmt.Sprintf("rootfs: %q cannot be below an overlay", s))
			}
		}
	}
	return nil
}

func validSerial(s string) bool {
	if s == "" || len(s) > maxSerial {
		return false
	}
	for _, r := range s {
		if (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' {
			return false
		}
	}
	return true
}

// openStorage makes a container's disks and its overlay, and changes req to
// what an engine knows: shares and numbers of devices. undo takes all of it away;
// it is nil if there is nothing.
func (a *Agent) openStorage(ctx context.Context, req *agentv1.CreateContainerRequest) (undo func() error, err error) {
	if err := checkStorage(req); err != nil {
		return nil, err
	}
	if len(req.GetDisks()) == 0 && !req.GetRootfs().GetOverlay() {
		return nil, nil
	}
	var steps []func() error
	all := func() error {
		var errs []error
		for _, f := range slices.Backward(steps) {
			errs = append(errs, f())
		}
		steps = nil
		return errors.Join(errs...)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, all())
		}
	}()
	if len(req.GetDisks()) > 0 {
		numbers, release, err := a.system.OpenDisks(ctx, req.GetDisks())
		if release != nil {
			steps = append(steps, release)
		}
		if err != nil {
			return nil, err
		}
		assignDisks(req, numbers)
	}
	if req.GetRootfs().GetOverlay() {
		remove, err := a.system.Overlay(ctx, req.GetContainerId(), req.GetRootfs())
		if err != nil {
			return nil, fmt.Errorf("rootfs: overlay: %w", err)
		}
		steps = append(steps, remove)
	}
	return all, nil
}

// assignDisks gives the devices of a request the numbers of their disks, and the
// container access to them.
func assignDisks(req *agentv1.CreateContainerRequest, numbers map[string]uint64) {
	for _, d := range req.GetDisks() {
		if len(d.GetDevices()) == 0 {
			continue
		}
		rdev := numbers[d.GetSerial()]
		major, minor := unix.Major(rdev), unix.Minor(rdev)
		for _, dev := range req.GetDevices() {
			if dev.GetType() == "b" && slices.Contains(d.GetDevices(), dev.GetPath()) {
				dev.Major, dev.Minor = major, minor
			}
		}
		// Without rules all is allowed.
		if r := req.GetResources(); len(r.GetDevices()) > 0 && d.GetAccess() != "" {
			r.Devices = append(r.Devices, &agentv1.DeviceRule{Allow: true, Type: "b", Major: int64(major), Minor: int64(minor), Access: d.GetAccess()})
		}
	}
}

// OpenDisks implements System.
func (g *Guest) OpenDisks(ctx context.Context, ds []*agentv1.Disk) (_ map[string]uint64, release func() error, err error) {
	if err := g.Ready(ctx); err != nil {
		return nil, nil, err
	}
	// From before the driver looks for disks.
	events, err := openUevents()
	if err != nil {
		return nil, nil, fmt.Errorf("follow the kernel's events: %w", err)
	}
	defer unix.Close(events)
	for _, name := range []string{"sd_mod", "virtio_scsi"} {
		if err := g.modules.load(name); err != nil && !errors.Is(err, errNoModule) {
			return nil, nil, err
		}
	}
	var steps []func() error
	release = func() error {
		var errs []error
		for _, f := range slices.Backward(steps) {
			errs = append(errs, f())
		}
		steps = nil
		return errors.Join(errs...)
	}
	names, err := awaitDisks(ctx, events, ds)
	for _, name := range names {
		steps = append(steps, func() error { return forgetDisk(name) })
	}
	if err != nil {
		return nil, release, err
	}
	numbers := make(map[string]uint64)
	for _, d := range ds {
		var st unix.Stat_t
		node := "/dev/" + names[d.GetSerial()]
		if err := unix.Stat(node, &st); err != nil {
			return nil, release, fmt.Errorf("disk %s: %w", d.GetSerial(), &os.PathError{Op: "stat", Path: node, Err: err})
		}
		numbers[d.GetSerial()] = st.Rdev
		if d.GetType() == "" {
			continue
		}
		unmount, err := g.mountDisk(d, node)
		if err != nil {
			return nil, release, err
		}
		steps = append(steps, unmount)
	}
	return numbers, release, nil
}

// mountDisk mounts a disk's file system below diskDir.
func (g *Guest) mountDisk(d *agentv1.Disk, node string) (unmount func() error, err error) {
	if err := g.modules.load("fs-" + d.GetType()); err != nil && !errors.Is(err, errNoModule) {
		g.log.Print(err)
	}
	dir := filepath.Join(diskDir, d.GetSerial())
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	var flags uintptr
	data := slices.Clone(d.GetData())
	for _, f := range d.GetFlags() {
		switch f {
		case "ro":
			flags |= unix.MS_RDONLY
		case "sync":
			flags |= unix.MS_SYNCHRONOUS
		case "dirsync":
			flags |= unix.MS_DIRSYNC
		case "lazytime":
			flags |= unix.MS_LAZYTIME
		case "mand":
			flags |= unix.MS_MANDLOCK
		default:
			data = append(data, f)
		}
	}
	if err := unix.Mount(node, dir, d.GetType(), flags, strings.Join(data, ",")); err != nil {
		_ = os.Remove(dir)
		switch {
		case errors.Is(err, unix.ENODEV):
			return nil, fmt.Errorf("disk %s: the guest's kernel does not have the file system %s", d.GetSerial(), d.GetType())
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EUCLEAN):
			return nil, fmt.Errorf("disk %s: mount it as %s: it has no such file system, or an option is wrong: %w", d.GetSerial(), d.GetType(), err)
		}
		return nil, fmt.Errorf("disk %s: mount it as %s: %w", d.GetSerial(), d.GetType(), err)
	}
	return func() error {
		// What somebody still uses is on the disk, whatever becomes of it.
		if f, err := os.Open(dir); err == nil {
			if err := unix.Syncfs(int(f.Fd())); err != nil {
				g.log.Printf("disk %s: flush: %v", d.GetSerial(), err)
			}
			_ = f.Close()
		}
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("disk %s: unmount: %w", d.GetSerial(), err)
		}
		if err := awaitRelease(node); err != nil {
			g.log.Printf("disk %s: still in use: %v", d.GetSerial(), err)
		}
		return os.Remove(dir)
	}, nil
}

// awaitRelease waits until no file system has a disk: mount namespaces of
// processes that have been killed end a little later.
func awaitRelease(node string) error {
	for end := time.Now().Add(diskRelease); ; {
		fd, err := unix.Open(node, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
		if err == nil {
			return unix.Close(fd)
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			return err
		}
		t := time.NewTimer(5 * time.Millisecond)
		<-t.C
	}
}

// forgetDisk lets the kernel flush and forget a disk before it is taken out.
func forgetDisk(name string) error {
	err := os.WriteFile(filepath.Join("/sys/block", name, "device/delete"), []byte("1"), 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// openUevents opens a socket for the kernel's messages about devices
// (kobject_uevent; netlink(7)).
func openUevents() (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return -1, err
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// awaitDisks waits until the kernel has all disks, and returns their names by
// serial number; with an error, those that are there.
func awaitDisks(ctx context.Context, events int, ds []*agentv1.Disk) (map[string]string, error) {
	end := time.Now().Add(diskWait)
	for {
		names, err := findDisks("/sys/block")
		if err != nil {
			return nil, err
		}
		found := make(map[string]string)
		missing := ""
		for _, d := range ds {
			if name := names[d.GetSerial()]; name != "" && canOpen("/dev/"+name) {
				found[d.GetSerial()] = name
			} else {
				missing = d.GetSerial()
			}
		}
		if missing == "" {
			return found, nil
		}
		if ctx.Err() != nil {
			return found, ctx.Err()
		}
		if time.Now().After(end) {
			return found, fmt.Errorf("disk %s: the guest's kernel has not found it within %v", missing, diskWait)
		}
		fds := []unix.PollFd{{Fd: int32(events), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(diskStep.Milliseconds()))
		if err != nil && !errors.Is(err, unix.EINTR) {
			return found, err
		}
		if n == 0 {
			// The controller has room for few events of its own.
			rescan("/sys/class/scsi_host")
			continue
		}
		for buf := make([]byte, 8192); ; { // one look at the disks for all that are waiting
			if _, err := unix.Read(events, buf); err != nil {
				break
			}
		}
	}
}

// canOpen tells whether a block device is there for good: the kernel shows a disk
// in sysfs, and makes its node, a little before it can be opened. The event of the
// disk comes after that.
func canOpen(node string) bool {
	fd, err := unix.Open(node, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err == nil {
		_ = unix.Close(fd)
	}
	return !errors.Is(err, unix.ENXIO) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.ENOENT)
}

// rescan lets the controllers in dir look for disks.
func rescan(dir string) {
	hosts, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, h := range hosts {
		_ = os.WriteFile(filepath.Join(dir, h.Name(), "scan"), []byte("- - -"), 0)
	}
}

// findDisks returns the names of the SCSI disks in a directory of sysfs that can
// be used, by their serial numbers.
func findDisks(dir string) (map[string]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	names := make(map[string]string)
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), "sd") {
			continue
		}
		page, err := os.ReadFile(filepath.Join(dir, e.Name(), "device/vpd_pg80"))
		if err != nil {
			continue // it is not complete yet, or gone again
		}
		size, err := os.ReadFile(filepath.Join(dir, e.Name(), "size"))
		if n, perr := strconv.ParseUint(strings.TrimSpace(string(size)), 10, 64); err != nil || perr != nil || n == 0 {
			continue
		}
		if serial, ok := unitSerial(page); ok {
			names[serial] = e.Name()
		}
	}
	return names, nil
}

// unitSerial reads the "Unit Serial Number" page of a SCSI device (SPC-4, 7.8.15):
// four bytes, of which the last two are the length of what follows.
func unitSerial(page []byte) (string, bool) {
	if len(page) < 4 || page[1] != 0x80 {
		return "", false
	}
	n := int(page[2])<<8 | int(page[3])
	if n > len(page)-4 {
		return "", false
	}
	s := strings.Trim(string(page[4:4+n]), " \x00")
	return s, validSerial(s)
}

// FreezeDisks implements System.
func (g *Guest) FreezeDisks() {
	const fiFreeze = 0xc0045877 // FIFREEZE of linux/fs.h
	entries, err := os.ReadDir(diskDir)
	if err != nil {
		return // there was none
	}
	for _, e := range entries {
		f, err := os.Open(filepath.Join(diskDir, e.Name()))
		if err != nil {
			continue
		}
		// A read-only file system, and memory, need none.
		if err := unix.IoctlSetInt(int(f.Fd()), fiFreeze, 0); err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EROFS) && !errors.Is(err, unix.EBUSY) {
			g.log.Printf("disk %s: freeze: %v", e.Name(), err)
		}
		_ = f.Close()
	}
}

// Overlay implements System.
func (g *Guest) Overlay(ctx context.Context, id string, r *agentv1.Rootfs) (_ func() error, err error) {
	if err := g.Ready(ctx); err != nil {
		return nil, err
	}
	if err := g.modules.load("overlay"); err != nil && !errors.Is(err, errNoModule) {
		g.log.Print(err)
	}
	name := "overlay-" + id
	dir := filepath.Join(diskDir, name)
	mounted := 0
	root := filepath.Join(dir, "root")
	remove := func() error {
		var errs []error
		for _, p := range slices.Backward([]string{dir, root}[:mounted]) {
			if err := unix.Unmount(p, unix.MNT_DETACH); err != nil {
				errs = append(errs, fmt.Errorf("unmount %s: %w", p, err))
			}
		}
		return errors.Join(append(errs, os.Remove(dir))...)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, remove())
		}
	}()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0755"); err != nil {
		return nil, fmt.Errorf("mount tmpfs: %w", err)
	}
	mounted++
	lower := filepath.Join(agentv1.ShareDir, r.GetShareTag(), r.GetSharePath())
	// With a slash, so that the kernel mounts a file system of the host's that the
	// share has there; an overlay takes no directory that waits for that.
	var st unix.Stat_t
	if err := unix.Stat(lower+"/", &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: lower, Err: err}
	}
	upper, work := filepath.Join(dir, "upper"), filepath.Join(dir, "work")
	for _, p := range []string{upper, work, root} {
		if err := os.Mkdir(p, 0o755); err != nil {
			return nil, err
		}
	}
	// The root directory itself is the upper one.
	if err := errors.Join(unix.Chown(upper, int(st.Uid), int(st.Gid)), unix.Chmod(upper, st.Mode&0o7777)); err != nil {
		return nil, err
	}
	data := "lowerdir=" + lower + ",upperdir=" + upper + ",workdir=" + work
	if err := unix.Mount("overlay", root, "overlay", 0, data); err != nil {
		return nil, fmt.Errorf("mount overlay: %w", err)
	}
	mounted++
	r.ShareTag, r.SharePath = agentv1.DiskTag, name+"/root"
	return remove, nil
}
