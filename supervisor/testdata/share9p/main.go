// Command share9p is the init process of a guest that attacks the pod's share:
// it drives the virtio 9p device itself, so it can send what no kernel sends.
// It prints "FAIL what" for everything that should not have been possible,
// "BOTHER" when the host may begin to change the share, and "END" at last.
//
// The kernel's command line has share9p.outside=DIR, a directory of the host
// that is not in the share and has a file "secret".
package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

var le = binary.LittleEndian

func main() {
	for dir, kind := range map[string]string{"/dev": "devtmpfs", "/proc": "proc"} {
		_ = os.MkdirAll(dir, 0o755)
		_ = unix.Mount(kind, dir, kind, 0, "")
	}
	if c, err := os.OpenFile("/dev/console", os.O_WRONLY, 0); err == nil {
		_ = unix.Dup2(int(c.Fd()), 1)
		_ = unix.Dup2(int(c.Fd()), 2)
	}
	if err := run(); err != nil {
		fmt.Println("FAIL cannot attack:", err)
	}
	fmt.Println("END")
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	select {}
}

func run() error {
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	var outside string
	for w := range strings.FieldsSeq(string(cmdline)) {
		if v, ok := strings.CutPrefix(w, "share9p.outside="); ok {
			outside = v
		}
	}
	d, err := findDevice()
	if err != nil {
		return err
	}
	c := &client{dev: d}
	if _, _, err := c.call(100, uint32(msize), "9P2000.L"); err != nil { // Tversion
		return err
	}
	if _, _, err := c.call(104, rootFid, nofid, "", "", uint32(0)); err != nil { // Tattach
		return err
	}
	a := &attack{client: c, outside: outside}
	a.all()
	return nil
}

// The fids that an attack uses.
const (
	nofid   = ^uint32(0)
	rootFid = uint32(1)
)

type attack struct {
	*client
	outside string
	next    uint32
}

func (a *attack) fail(format string, args ...any) { fmt.Printf("FAIL "+format+"\n", args...) }

// fid walks from the root to a path, one element per name.
func (a *attack) fid(path string) uint32 {
	f, err := a.walk(rootFid, strings.Split(path, "/")...)
	if err != nil {
		a.fail("walk to %s, which is allowed: %v", path, err)
	}
	return f
}

func (a *attack) walk(from uint32, names ...string) (uint32, error) {
	a.next++
	to := 100 + a.next
	args := []any{from, to, uint16(len(names))}
	for _, n := range names {
		args = append(args, n)
	}
	_, body, err := a.call(110, args...)
	if err == nil && int(le.Uint16(body)) != len(names) {
		err = unix.ENOENT
	}
	return to, err
}

// must is for what prepares an attack, never for what should not work.
func (a *attack) must(what string, err error) {
	if err != nil {
		a.fail("%s, which is allowed: %v", what, err)
	}
}

// refused is for what should not work.
func (a *attack) refused(what string, err error) {
	if err == nil {
		a.fail("%s was possible", what)
	}
}

const (
	oRdonly, oRdwr, oTrunc = uint32(0), uint32(2), uint32(0o1000)
	oNonblock              = uint32(0o4000)
)

func (a *attack) open(fid, flags uint32) error { _, _, err := a.call(12, fid, flags); return err }
func (a *attack) mkdir(dir uint32, name string) error {
	_, _, err := a.call(72, dir, name, uint32(0o755), uint32(0))
	return err
}
func (a *attack) symlink(dir uint32, name, target string) error {
	_, _, err := a.call(16, dir, name, target, uint32(0))
	return err
}
func (a *attack) mknod(dir uint32, name string, mode, major, minor uint32) error {
	_, _, err := a.call(18, dir, name, mode, major, minor, uint32(0))
	return err
}
func (a *attack) link(dir, fid uint32, name string) error {
	_, _, err := a.call(70, dir, fid, name)
	return err
}
func (a *attack) rename(from uint32, old string, to uint32, name string) error {
	_, _, err := a.call(74, from, old, to, name)
	return err
}
func (a *attack) unlink(dir uint32, name string, dirFlag uint32) error {
	_, _, err := a.call(76, dir, name, dirFlag)
	return err
}

// create turns a fid of a directory into one of an open file.
func (a *attack) create(dir uint32, name string) error {
	f, err := a.walk(dir)
	if err != nil {
		return err
	}
	_, _, err = a.call(14, f, name, oRdwr, uint32(0o644), uint32(0))
	return err
}

// setattr changes the size (valid 8), the mode (1) or the owner (2|4).
func (a *attack) setattr(fid, valid uint32) error {
	_, _, err := a.call(26, fid, valid, uint32(0o777), uint32(12345), uint32(12345), uint64(0),
		uint64(0), uint64(0), uint64(0), uint64(0))
	return err
}

func (a *attack) read(fid uint32) string {
	_, body, err := a.call(116, fid, uint64(0), uint32(256))
	if err != nil || len(body) < 4 {
		return ""
	}
	return string(body[4:])
}

func (a *attack) all() {
	vol, ro := a.fid("c/rootfs"), a.fid("@0/ro")

	// Names.
	up, err := a.walk(rootFid, "..", "..", "..")
	if err == nil {
		for _, name := range []string{"etc", strings.Split(strings.Trim(a.outside, "/"), "/")[0]} {
			_, err := a.walk(up, name)
			a.refused("walk ../"+name+" from the root", err)
		}
	}
	rel := strings.Repeat("../", 12) + strings.Trim(a.outside, "/")
	for _, name := range []string{rel, rel + "/secret", a.outside, "/", "", ".", "a/b", "c/rootfs"} {
		if _, err := a.walk(vol, name); err == nil && name != "." {
			a.fail("walk to the name %q was possible", name)
		}
		a.refused(fmt.Sprintf("mkdir of the name %q", name), a.mkdir(vol, name))
		a.refused(fmt.Sprintf("create of the name %q", name), a.create(vol, name))
		a.refused(fmt.Sprintf("symlink at the name %q", name), a.symlink(vol, name, "t"))
		a.refused(fmt.Sprintf("unlink of the name %q", name), a.unlink(vol, name, 0))
		a.refused(fmt.Sprintf("rmdir of the name %q", name), a.unlink(vol, name, 0x200))
		a.refused(fmt.Sprintf("rename of the name %q", name), a.rename(vol, name, vol, "taken"))
		a.must("create", errOr(a.create(vol, "mine"), unix.EEXIST))
		a.refused(fmt.Sprintf("rename to the name %q", name), a.rename(vol, "mine", vol, name))
		a.refused(fmt.Sprintf("mknod at the name %q", name), a.mknod(vol, name, unix.S_IFIFO|0o644, 0, 0))
	}
	for _, name := range []string{".."} {
		a.refused("unlink of ..", a.unlink(vol, name, 0x200))
		a.refused("rename of ..", a.rename(vol, name, vol, "taken"))
		a.refused("rename to ..", a.rename(vol, "mine", vol, name))
		a.refused("create of ..", a.create(vol, name))
	}

	// A symbolic link is never followed, as the last name or before it.
	a.must("symlink", a.symlink(vol, "dirlink", a.outside))
	a.must("symlink", a.symlink(vol, "filelink", a.outside+"/secret"))
	a.through("a planted link", a.fid("c/rootfs/dirlink"), a.fid("c/rootfs/filelink"))
	_, err = a.walk(vol, "dirlink", "secret")
	a.refused("walk through a link", err)
	a.must("hard link of a link", a.link(vol, a.fid("c/rootfs/filelink"), "hardlink"))
	a.refused("open of a hard link of a link", a.open(a.fid("c/rootfs/hardlink"), oRdonly))

	// The race: between the walk and the use of a fid its path becomes a link.
	a.must("mkdir", a.mkdir(vol, "race"))
	race := a.fid("c/rootfs/race")
	a.must("create", a.create(race, "secret"))
	var secrets [4]uint32
	for i := range secrets {
		secrets[i] = a.fid("c/rootfs/race/secret")
	}
	a.must("rename", a.rename(vol, "race", vol, "raced"))
	a.must("symlink", a.symlink(vol, "race", a.outside))
	// QEMU moves the paths of fids below a directory that it renames itself;
	// this fid was made before by way of a second name.
	stale, err := a.walk(race)
	a.must("clone a fid", err)
	for _, f := range secrets {
		if a.open(f, oRdwr) == nil {
			if s := a.read(f); strings.Contains(s, "SECRET") {
				a.fail("the race read the host's file: %q", s)
			}
		}
	}
	_ = a.create(stale, "planted")
	_ = a.mkdir(stale, "planted-dir")
	_ = a.setattr(secrets[0], 8)
	// The same, with the rename made where the server does not see that it moves
	// the fid: by an exchange of two names through a third.
	a.must("mkdir", a.mkdir(vol, "two"))
	two := a.fid("c/rootfs/two")
	a.must("create", a.create(two, "secret"))
	f := a.fid("c/rootfs/two/secret")
	a.must("unlink", a.unlink(two, "secret", 0))
	a.must("rmdir", a.unlink(vol, "two", 0x200))
	a.must("symlink", a.symlink(vol, "two", a.outside))
	a.through("a directory that has become a link", two, f)

	// Hard links lead from no mount to another.
	for what, err := range map[string]error{
		"hard link out of a read-only volume":           a.link(vol, a.fid("@0/ro/file"), "stolen"),
		"hard link into a read-only volume":             a.link(ro, a.fid("c/rootfs/mine"), "stolen"),
		"hard link into the share itself":               a.link(rootFid, a.fid("c/rootfs/mine"), "stolen"),
		"rename out of a read-only volume":              a.rename(ro, "file", vol, "stolen"),
		"rename into a read-only volume":                a.rename(vol, "mine", ro, "stolen"),
		"rename into the share itself":                  a.rename(vol, "mine", rootFid, "stolen"),
		"hard link of the second volume into the first": a.link(vol, a.fid("@1/second/file"), "stolen"),
	} {
		a.refused(what, err)
	}

	// Device nodes open nothing, fifos and sockets lead nowhere and hold nobody.
	for name, n := range map[string][3]uint32{
		"null": {unix.S_IFCHR | 0o666, 1, 3}, "mem": {unix.S_IFCHR | 0o666, 1, 1},
		"disk": {unix.S_IFBLK | 0o666, 8, 0}, "loop": {unix.S_IFBLK | 0o666, 7, 0},
		"fifo": {unix.S_IFIFO | 0o666, 0, 0}, "sock": {unix.S_IFSOCK | 0o666, 0, 0},
	} {
		if err := a.mknod(vol, name, n[0], n[1], n[2]); err != nil {
			continue // refused already
		}
		for _, flags := range []uint32{oRdonly, oRdwr, oRdwr | oNonblock} {
			f := a.fid("c/rootfs/" + name)
			if a.open(f, flags) == nil && name != "fifo" {
				a.fail("open of the special file %s with flags %#x was possible", name, flags)
			}
		}
	}

	// What is read-only stays as it is, and so does the share.
	for name, dir := range map[string]uint32{"the read-only volume": ro, "the share": rootFid, "a directory of the share": a.fid("c"), "a directory of volumes": a.fid("@0")} {
		a.refused("mkdir in "+name, a.mkdir(dir, "planted"))
		a.refused("create in "+name, a.create(dir, "planted"))
		a.refused("symlink in "+name, a.symlink(dir, "planted", a.outside))
		a.refused("mknod in "+name, a.mknod(dir, "planted", unix.S_IFIFO|0o644, 0, 0))
		a.refused("chmod of "+name, a.setattr(dir, 1))
		a.refused("chown of "+name, a.setattr(dir, 6))
	}
	a.refused("open for writing of a read-only file", a.open(a.fid("@0/ro/file"), oRdwr))
	a.refused("open and truncate of a read-only file", a.open(a.fid("@0/ro/file"), oRdwr|oTrunc))
	a.refused("truncate of a read-only file", a.setattr(a.fid("@0/ro/file"), 8))
	a.refused("unlink of a read-only file", a.unlink(ro, "file", 0))
	a.refused("rename of a mount point", a.rename(a.fid("c"), "rootfs", a.fid("c"), "moved"))
	a.refused("rename of a container's directory", a.rename(rootFid, "c", rootFid, "moved"))
	a.refused("removal of a mount point", a.unlink(a.fid("c"), "rootfs", 0x200))

	// Containers come and go meanwhile.
	fmt.Println("BOTHER")
	for end := time.Now().Add(4 * time.Second); time.Now().Before(end); {
		_ = a.rename(rootFid, "d", rootFid, "e")
		_ = a.unlink(rootFid, "d", 0x200)
		if a.symlink(rootFid, "d", a.outside) == nil {
			a.fail("a link in the place of a container's directory was possible")
		}
		if d, err := a.walk(rootFid, "d"); err == nil {
			if a.rename(d, "rootfs", d, "moved") == nil || a.symlink(d, "rootfs", a.outside) == nil {
				a.fail("a change of a mount point's parent was possible")
			}
			_, _, _ = a.call(120, d)
		}
		if f, err := a.walk(rootFid, "d", "rootfs"); err == nil {
			// The container's own files are the guest's to replace.
			_ = a.mkdir(f, "sub")
			_ = a.rename(f, "sub", f, "sub2")
			_ = a.symlink(f, "sub", a.outside)
			_ = a.unlink(f, "sub", 0)
			_ = a.unlink(f, "sub2", 0x200)
			_, _, _ = a.call(120, f)
		}
	}
}

// through tries all that leads through fids that are links: dir to the
// directory outside, file to the file in it.
func (a *attack) through(what string, dir, file uint32) {
	for _, flags := range []uint32{oRdonly, oRdwr, oRdwr | oTrunc} {
		f, err := a.walk(file)
		if err == nil {
			a.refused("open of "+what, a.open(f, flags))
		}
	}
	if f, err := a.walk(dir); err == nil {
		a.refused("open of a directory behind "+what, a.open(f, 0o200000))
	}
	a.refused("create behind "+what, a.create(dir, "planted"))
	a.refused("mkdir behind "+what, a.mkdir(dir, "planted"))
	a.refused("symlink behind "+what, a.symlink(dir, "planted", "t"))
	a.refused("mknod behind "+what, a.mknod(dir, "planted", unix.S_IFIFO|0o644, 0, 0))
	a.refused("unlink behind "+what, a.unlink(dir, "secret", 0))
	vol := a.fid("c/rootfs")
	a.refused("rename from behind "+what, a.rename(dir, "secret", vol, "stolen"))
	a.refused("rename to behind "+what, a.rename(vol, "mine", dir, "planted"))
	a.refused("hard link to behind "+what, a.link(dir, a.fid("c/rootfs/mine"), "planted"))
	a.refused("truncate through "+what, a.setattr(file, 8))
	// These may change the link itself; the host looks at what is behind it.
	_ = a.setattr(file, 1)
	_ = a.setattr(file, 6)
	_, err := a.walk(dir, "secret")
	a.refused("walk through "+what, err)
}

func errOr(err, fine error) error {
	if errors.Is(err, fine) {
		return nil
	}
	return err
}

// client speaks 9P2000.L, one message at a time.
type client struct {
	dev *device
	tag uint16
}

const msize = 4096

func (c *client) call(kind uint8, args ...any) (uint8, []byte, error) {
	c.tag++
	var b bytes.Buffer
	b.Write([]byte{0, 0, 0, 0, kind})
	tag := c.tag
	if kind == 100 {
		tag = 0xffff
	}
	_ = binary.Write(&b, le, tag)
	for _, x := range args {
		if s, ok := x.(string); ok {
			_ = binary.Write(&b, le, uint16(len(s)))
			b.WriteString(s)
			continue
		}
		_ = binary.Write(&b, le, x)
	}
	m := b.Bytes()
	if len(m) > msize {
		return 0, nil, unix.E2BIG
	}
	le.PutUint32(m, uint32(len(m)))
	r, err := c.dev.exchange(m)
	if err != nil {
		fmt.Println("FAIL the server does not answer:", err)
		fmt.Println("END")
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
		select {}
	}
	if len(r) < 7 {
		return 0, nil, unix.EPROTO
	}
	if r[4] == 7 { // Rlerror
		return 7, nil, unix.Errno(le.Uint32(r[7:]))
	}
	return r[4], r[7:], nil
}

// device is a virtio device of the mmio transport (virtio 1.2, section 4.2) with
// one queue.
type device struct {
	regs  []byte
	queue []byte // descriptors at 0, available ring at 1024, used ring at 2048
	out   []byte
	in    []byte
	seen  uint16
}

// The microvm machine's transports.
const (
	mmioBase  = 0xfeb00000
	mmioSize  = 512
	mmioCount = 32
	device9P  = 9
)

func findDevice() (*device, error) {
	mem, err := os.OpenFile("/dev/mem", os.O_RDWR|os.O_SYNC, 0)
	if err != nil {
		return nil, err
	}
	all, err := unix.Mmap(int(mem.Fd()), mmioBase, mmioSize*mmioCount, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map the devices: %w", err)
	}
	for i := range mmioCount {
		d := &device{regs: all[i*mmioSize : (i+1)*mmioSize]}
		if d.get(0) == 0x74726976 && d.get(8) == device9P {
			return d, d.start()
		}
	}
	return nil, errors.New("there is no 9p device")
}

func (d *device) reg(off int) *uint32       { return (*uint32)(unsafe.Pointer(&d.regs[off])) }
func (d *device) get(off int) uint32        { return *d.reg(off) }
func (d *device) put(off int, value uint32) { *d.reg(off) = value }

func (d *device) start() error {
	for _, p := range []*[]byte{&d.queue, &d.out, &d.in} {
		var err error
		if *p, err = unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE); err != nil {
			return err
		}
		if err := unix.Mlock(*p); err != nil {
			return err
		}
		(*p)[0] = 0
	}
	const status = 0x70
	d.put(status, 0)
	d.put(status, 1|2)
	d.put(0x24, 1)
	d.put(0x20, 1) // VIRTIO_F_VERSION_1
	d.put(0x24, 0)
	d.put(0x20, 0)
	d.put(status, 1|2|8)
	if d.get(status)&8 == 0 {
		return errors.New("the device wants other features")
	}
	d.put(0x30, 0)
	d.put(0x38, 2)
	base, err := physical(d.queue)
	if err != nil {
		return err
	}
	for reg, off := range map[int]uint64{0x80: 0, 0x90: 1024, 0xa0: 2048} {
		d.put(reg, uint32(base+off))
		d.put(reg+4, uint32((base+off)>>32))
	}
	for i, buf := range [][]byte{d.out, d.in} {
		at, err := physical(buf)
		if err != nil {
			return err
		}
		le.PutUint64(d.queue[16*i:], at)
	}
	le.PutUint16(d.queue[12:], 1)       // the first is followed
	le.PutUint16(d.queue[14:], 1)       // by the second,
	le.PutUint32(d.queue[16+8:], msize) // which the device
	le.PutUint16(d.queue[16+12:], 2)    // writes
	d.put(0x44, 1)
	d.put(status, 1|2|8|4)
	return nil
}

// exchange sends a message and waits for its answer.
func (d *device) exchange(m []byte) ([]byte, error) {
	copy(d.out, m)
	le.PutUint32(d.queue[8:], uint32(len(m)))
	le.PutUint16(d.queue[1024+4+2*int(d.seen%2):], 0)
	d.seen++
	le.PutUint16(d.queue[1024+2:], d.seen)
	d.put(0x50, 0)
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); {
		if le.Uint16(d.queue[2048+2:]) == d.seen {
			d.put(0x64, d.get(0x60))
			n := le.Uint32(d.in)
			if n > msize {
				return nil, unix.EPROTO
			}
			return bytes.Clone(d.in[:n]), nil
		}
		unix.Nanosleep(&unix.Timespec{Nsec: 20000}, nil)
	}
	return nil, unix.ETIMEDOUT
}

// physical is where a page of this process is in memory.
func physical(p []byte) (uint64, error) {
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var b [8]byte
	if _, err := f.ReadAt(b[:], int64(uintptr(unsafe.Pointer(&p[0]))/4096*8)); err != nil {
		return 0, err
	}
	e := le.Uint64(b[:])
	if e>>63 == 0 || e&(1<<55-1) == 0 {
		return 0, errors.New("a page has no address")
	}
	return e & (1<<55 - 1) * 4096, nil
}
