package qemu

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/hypervisor"
)

// parent is the snapshot that a clone was made of.
type parent struct {
	memory      *os.File // sealed; the vm's own descriptor
	fingerprint string
}

// ramBase is where the guest has the first byte of its memory.
func ramBase(arch string) uint64 {
	if arch == "arm64" {
		return 0x4000_0000
	}
	return 0
}

// saveMemory copies the guest's memory out of QEMU's into a sealed memfd.
func (v *vm) saveMemory(ctx context.Context, size int64) (_ *os.File, err error) {
	m, err := hypervisor.NewMemory("runv-memory", size)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			m.Close()
		}
	}()
	stop := func() error {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-v.proc.done:
			return hypervisor.ErrEnded
		default:
			return nil
		}
	}
	if v.parent != nil {
		if err := hypervisor.CopySparse(m, v.parent.memory, size, stop); err != nil {
			return nil, fmt.Errorf("copy the memory that it was cloned from: %w", err)
		}
	}
	start, err := v.guestMemory(ctx)
	if err != nil {
		return nil, err
	}
	ram := region{start, start + uint64(size)}
	pid := v.Pid()
	if err := checkMapped(pid, ram); err != nil {
		return nil, err
	}
	own, err := ownPages(pid, ram)
	if err != nil {
		return nil, err
	}
	c := copier{pid: pid, ram: ram, to: m, overBase: v.parent != nil}
	if err := c.copy(own, stop); err != nil {
		// A process that ends takes its memory along.
		if serr := stop(); serr != nil {
			err = serr
		}
		return nil, err
	}
	if err := hypervisor.SealMemory(m); err != nil {
		return nil, err
	}
	return m, nil
}

// guestMemory asks QEMU where in its address space the guest's memory is.
func (v *vm) guestMemory(ctx context.Context) (uint64, error) {
	command := map[string]string{"command-line": fmt.Sprintf("gpa2hva %#x", ramBase(hostArch))}
	var reply string
	if err := v.qmp.Execute(ctx, "human-monitor-command", command, &reply); err != nil {
		return 0, err
	}
	return parseHVA(reply)
}

// parseHVA reads "Host virtual address for 0x0 (ram) is 0x7f537fe00000".
func parseHVA(reply string) (uint64, error) {
	reply = strings.TrimSpace(reply)
	_, hex, ok := strings.Cut(reply, " (ram) is 0x")
	if !ok {
		return 0, fmt.Errorf("qemu says of the guest's memory %q", printable([]byte(reply[:min(len(reply), 200)])))
	}
	n, err := strconv.ParseUint(hex, 16, 63)
	if err != nil || n == 0 || n%uint64(os.Getpagesize()) != 0 {
		return 0, fmt.Errorf("qemu has the guest's memory at %q", printable([]byte(hex[:min(len(hex), 40)])))
	}
	return n, nil
}

// region is a range of addresses of a process.
type region struct{ start, end uint64 }

// checkMapped makes sure that all of r is private writable memory of a process,
// whatever the process says of itself.
func checkMapped(pid int, r region) error {
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/maps")
	if err != nil {
		return err
	}
	defer f.Close()
	at, err := mappedTo(f, r)
	if err != nil {
		return err
	}
	if at < r.end {
		return fmt.Errorf("the process has no memory of its own at %#x, where the guest's should be", at)
	}
	return nil
}

// mappedTo reads /proc/PID/maps and returns the end of the private writable
// mappings that cover r from its start on.
func mappedTo(maps io.Reader, r region) (uint64, error) {
	at := r.start
	s := bufio.NewScanner(maps)
	for s.Scan() && at < r.end {
		fields := strings.Fields(s.Text())
		if len(fields) < 2 {
			continue
		}
		from, to, ok := strings.Cut(fields[0], "-")
		start, err1 := strconv.ParseUint(from, 16, 64)
		end, err2 := strconv.ParseUint(to, 16, 64)
		if !ok || err1 != nil || err2 != nil {
			return 0, fmt.Errorf("unexpected line in maps: %q", s.Text())
		}
		if start <= at && at < end {
			if !strings.HasPrefix(fields[1], "rw") || !strings.HasSuffix(fields[1], "p") {
				break
			}
			at = end
		}
	}
	return at, s.Err()
}

// ownPages returns the ranges of r, in order, that the process has written to,
// or at least may have: pages in memory or in swap that belong to no file.
func ownPages(pid int, r region) ([]region, error) {
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/pagemap")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	own, err := scanPages(f, r)
	if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EINVAL) {
		return readPages(f, r)
	}
	return own, err
}

// The ioctl PAGEMAP_SCAN, from Linux 6.7 on (Documentation/admin-guide/mm/pagemap.rst).
const (
	pagemapScan = 0xc0606610

	pageIsFile    = 1 << 2
	pageIsPresent = 1 << 3
	pageIsSwapped = 1 << 4
	pageIsPFNZero = 1 << 5
)

type pmScanArg struct {
	size, flags           uint64
	start, end, walkEnd   uint64
	vec, vecLen, maxPages uint64
	inverted, mask        uint64
	anyOf, result         uint64
}

type pageRegion struct{ start, end, categories uint64 }

func scanPages(pagemap *os.File, r region) ([]region, error) {
	vec := make([]pageRegion, 4096)
	conn, err := pagemap.SyscallConn()
	if err != nil {
		return nil, err
	}
	var own []region
	for at := r.start; at < r.end; {
		arg := &pmScanArg{
			start: at, end: r.end,
			vec: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(vec)))), vecLen: uint64(len(vec)),
			inverted: pageIsFile | pageIsPFNZero, mask: pageIsFile | pageIsPFNZero,
			anyOf: pageIsPresent | pageIsSwapped,
		}
		arg.size = uint64(unsafe.Sizeof(*arg))
		var n uintptr
		var errno unix.Errno
		if err := conn.Control(func(fd uintptr) {
			n, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, pagemapScan, uintptr(unsafe.Pointer(arg)))
		}); err != nil {
			return nil, err
		}
		runtime.KeepAlive(vec)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return nil, fmt.Errorf("scan pagemap: %w", errno)
		}
		for _, p := range vec[:min(int(n), len(vec))] {
			own = appendRegion(own, region{p.start, p.end})
		}
		if arg.walkEnd <= at {
			return nil, fmt.Errorf("scan pagemap: stuck at %#x", at)
		}
		at = arg.walkEnd
	}
	return own, nil
}

// Bits of an entry of /proc/PID/pagemap.
const (
	pmPresent = 1 << 63
	pmSwapped = 1 << 62
	pmFile    = 1 << 61
)

// readPages does it for older kernels, with one read for every 256 MiB.
func readPages(pagemap io.ReaderAt, r region) ([]region, error) {
	page := uint64(os.Getpagesize())
	buf := make([]byte, 64<<10*8)
	var own []region
	for at := r.start; at < r.end; {
		n := min(uint64(len(buf)), (r.end-at)/page*8)
		if _, err := pagemap.ReadAt(buf[:n], int64(at/page*8)); err != nil {
			return nil, fmt.Errorf("read pagemap: %w", err)
		}
		for i := uint64(0); i < n; i += 8 {
			e := binary.NativeEndian.Uint64(buf[i:])
			if e&(pmPresent|pmSwapped) != 0 && e&pmFile == 0 {
				own = appendRegion(own, region{at, at + page})
			}
			at += page
		}
	}
	return own, nil
}

// appendRegion joins r to the last region if it touches it.
func appendRegion(rs []region, r region) []region {
	if n := len(rs); n > 0 && rs[n-1].end == r.start {
		rs[n-1].end = r.end
		return rs
	}
	return append(rs, r)
}

// copier copies pages of a process to a file.
type copier struct {
	pid int
	ram region
	to  *os.File
	// overBase: the file has something already, that a page of zeros must
	// replace.
	overBase bool
}

const (
	copyBuffer  = 512 << 10
	copyRegions = 256
)

func (c *copier) copy(own []region, stop func() error) error {
	buf := make([]byte, copyBuffer)
	var batch []region
	room := uint64(len(buf))
	for _, r := range own {
		for r.start < r.end {
			part := region{r.start, min(r.end, r.start+room)}
			batch = append(batch, part)
			room -= part.end - part.start
			r.start = part.end
			if room == 0 || len(batch) == copyRegions {
				if err := stop(); err != nil {
					return err
				}
				if err := c.flush(batch, buf); err != nil {
					return err
				}
				batch, room = batch[:0], uint64(len(buf))
			}
		}
	}
	return c.flush(batch, buf)
}

// flush copies a batch of regions, which fit into buf.
func (c *copier) flush(batch []region, buf []byte) error {
	if len(batch) == 0 {
		return nil
	}
	var total int
	remote := make([]unix.RemoteIovec, len(batch))
	for i, r := range batch {
		n := int(r.end - r.start)
		remote[i] = unix.RemoteIovec{Base: uintptr(r.start), Len: n}
		total += n
	}
	local := unix.Iovec{Base: &buf[0]}
	local.SetLen(total)
	n, err := unix.ProcessVMReadv(c.pid, []unix.Iovec{local}, remote, 0)
	if err != nil {
		return fmt.Errorf("read qemu's memory: %w", err)
	}
	if n != total {
		return fmt.Errorf("read qemu's memory: %d of %d bytes", n, total)
	}
	for _, r := range batch {
		p := buf[:r.end-r.start]
		buf = buf[len(p):]
		off := int64(r.start - c.ram.start)
		if c.overBase {
			if err := c.punch(p, off); err != nil {
				return err
			}
		}
		if err := hypervisor.WritePages(c.to, p, off); err != nil {
			return err
		}
	}
	return nil
}

// punch makes holes where p is zero.
func (c *copier) punch(p []byte, off int64) error {
	page := os.Getpagesize()
	conn, err := c.to.SyscallConn()
	if err != nil {
		return err
	}
	for i := 0; i < len(p); i += page {
		if !hypervisor.Zero(p[i : i+page]) {
			continue
		}
		end := i + page
		for end < len(p) && hypervisor.Zero(p[end:end+page]) {
			end += page
		}
		if cerr := conn.Control(func(fd uintptr) {
			err = unix.Fallocate(int(fd), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off+int64(i), int64(end-i))
		}); cerr != nil || err != nil {
			return errors.Join(cerr, err)
		}
		i = end - page
	}
	return nil
}
