package qemu

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unsafe"

	"github.com/golang/glog"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/hypervisor"
)

// nodes lets a guest make unix sockets, fifos and device nodes on a share.
//
// QEMU's file server has made such a file when it sets its mode: it opens the
// file with O_PATH and calls chmod on /proc/self/fd/N. Since the fix of
// CVE-2023-2861 its function for opening files closes what is neither a regular
// file nor a directory, also if it was opened with O_PATH, which gives access to
// nothing. So the guest gets ENXIO and the file is removed again. QEMU corrected
// that in December 2024, which has not reached every series: the 7.2 of Debian 12
// has the fault. A corrected one works as well under the filter.
//
// A system call filter makes QEMU stop at exactly these two system calls, and a
// goroutine of ours answers them (seccomp_unotify(2)). An open of a special file
// gets the descriptor of an empty, sealed memfd, which is a regular file to
// fstat; a chmod of that descriptor sets the mode of the special file. Every
// other such call goes on as if nothing had been asked, and every other system
// call never stops.
//
// # What a QEMU that has been taken over gains
//
// Nothing. The goroutine does one thing with its own rights: it sets the mode of
// a fifo, a socket or a device node that is one step below a directory which
// QEMU has open, as seen through QEMU's own mount of it. A mount that is
// read-only to QEMU is so here, nothing is opened (O_PATH), no symbolic link is
// followed, and QEMU has the capabilities for a chmod of its own (CAP_FOWNER,
// CAP_FSETID, CAP_DAC_OVERRIDE of shareCapabilities) or the same user as we. The
// descriptor that QEMU is given is of an empty file that cannot be written.
//
// The filter is no fence, so neither is the answer "go on"
// (SECCOMP_USER_NOTIF_FLAG_CONTINUE): the kernel then does what QEMU's memory
// says at that time, with QEMU's rights, under its other filter (scSandbox), as
// it would have done without us. Names and paths may change under our eyes for
// that reason; what we act on is read once, and the file is looked at again
// after it has been opened.
//
// All descriptors and all memory are those of the process that we started, by
// files in its /proc directory that were opened before it could be reaped: a
// reused pid is never met. A process that a taken-over QEMU forked, which its
// sandbox denies, would be answered by QEMU's descriptors, not its own.
type nodes struct {
	listener int // of the filter; -1 if there is none
	proc     int // the process's directory in /proc, O_PATH
	mem      int // its memory

	// made are the special files whose mode has not been set yet, oldest first,
	// at most maxNodes. Only serve uses it.
	made []madeNode
}

// madeNode is a special file that QEMU believes it has opened.
type madeNode struct {
	memfd int // what QEMU has got; open here too, so that its number stays its own
	ino   uint64
	dev   uint64
	node  int // the file, O_PATH
}

// chmodCall is a system call that sets a mode by path, with the places of its
// arguments; flags is -1 if it has none.
type chmodCall struct{ nr, path, mode, flags int }

const (
	// maxNodes is more than QEMU's file server has threads (64), each of which
	// opens one file and sets its mode before it goes on.
	maxNodes = 128

	// openFlags are those with which the file server opens a file to set its
	// mode, and nothing else; flagsIgnored make no difference.
	openFlags    = unix.O_RDONLY | unix.O_PATH | unix.O_NOFOLLOW | unix.O_NOCTTY | unix.O_NONBLOCK
	flagsIgnored = unix.O_CLOEXEC | largeFile
)

// newNodes returns nil for a VM without a share that it may write to: nothing is
// installed and served then.
func newNodes(c hypervisor.Config) *nodes {
	for _, s := range c.Shares {
		if !s.ReadOnly && s.Server == nil {
			return &nodes{listener: -1, proc: -1, mem: -1}
		}
	}
	return nil
}

// prepare adds install to a preparation for spawn, as its last step.
func (n *nodes) prepare(first func() error) func() error {
	if n == nil {
		return first
	}
	return func() error {
		if first != nil {
			if err := first(); err != nil {
				return err
			}
		}
		n.install()
		return nil
	}
}

// child adds watch to what spawn does with a new child, as its first step: what
// follows may take the host's /proc away.
func (n *nodes) child(then func(pid int) error) func(pid int) error {
	if n == nil {
		return then
	}
	return func(pid int) error {
		n.watch(pid)
		if then == nil {
			return nil
		}
		return then(pid)
	}
}

// own makes n part of what spawn returned.
func (n *nodes) own(p *process, err error) (*process, error) {
	if err != nil {
		n.close()
		return nil, err
	}
	p.nodes = n
	return p, nil
}

// install puts the filter on the calling thread, and with it on the child that
// the thread starts afterwards. The thread ends with the child, as spawn's does,
// and makes none of the calls that the filter stops. A kernel that cannot do
// this, or a filter above us that listens already, is a warning: the guest then
// cannot make special files.
func (n *nodes) install() {
	if err := n.tryInstall(); err != nil {
		glog.Warningf("guests cannot make sockets, fifos and devices on a share: %v", err)
	}
}

func (n *nodes) tryInstall() error {
	// 5.9 is the first kernel that gives descriptors away (SECCOMP_IOCTL_NOTIF_ADDFD).
	// It cannot be asked without a notification, and a filter that has been
	// installed stays.
	if release := kernelRelease(); !atLeast(release, 5, 9) {
		return fmt.Errorf("kernel %s is older than 5.9", release)
	}
	filter, err := nodesFilter()
	if err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("set no_new_privs: %w", err)
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	// With the second flag, of kernel 5.19, a signal does not interrupt a call
	// that is being answered.
	for _, flags := range []uintptr{unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER} {
		fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&prog)))
		if errno == 0 {
			n.listener = int(fd) // close-on-exec
			// Kernel 6.6: whoever stops is answered on the same CPU.
			_, _, _ = unix.Syscall(unix.SYS_IOCTL, fd, unix.SECCOMP_IOCTL_NOTIF_SET_FLAGS, unix.SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP)
			return nil
		}
		if err = errno; errno != unix.EINVAL {
			break
		}
	}
	return fmt.Errorf("set system call filter: %w", err)
}

// watch opens what serve needs of the child. It is called on the thread that
// started the child, before anybody waits for it: the pid is still its own.
func (n *nodes) watch(pid int) {
	if n.listener < 0 {
		return
	}
	if err := n.tryWatch(pid); err != nil {
		glog.Warningf("guests cannot make sockets, fifos and devices on a share: %v", err)
	}
}

func (n *nodes) tryWatch(pid int) error {
	var err error
	dir := "/proc/" + strconv.Itoa(pid)
	if n.proc, err = unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("open %s: %w", dir, err)
	}
	if n.mem, err = unix.Openat(n.proc, "mem", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("open %s/mem: %w", dir, err)
	}
	return nil
}

// close gives up everything. QEMU's calls then fail with ENOSYS, if it is alive.
func (n *nodes) close() {
	if n == nil {
		return
	}
	for _, m := range n.made {
		m.close()
	}
	n.made = nil
	for _, fd := range []*int{&n.listener, &n.proc, &n.mem} {
		if *fd >= 0 {
			_ = unix.Close(*fd)
			*fd = -1
		}
	}
}

func (m madeNode) close() {
	_ = unix.Close(m.memfd)
	_ = unix.Close(m.node)
}

// notification is struct seccomp_notif, with the struct seccomp_data in it.
type notification struct {
	id    uint64
	pid   uint32
	flags uint32
	nr    int32
	arch  uint32
	ip    uint64
	args  [6]uint64
}

// response is struct seccomp_notif_resp.
type response struct {
	id    uint64
	val   int64
	err   int32
	flags uint32
}

// addFD is struct seccomp_notif_addfd.
type addFD struct {
	id       uint64
	flags    uint32
	src      uint32
	dst      uint32
	dstFlags uint32
}

// serve answers until the filter has no user: QEMU and the thread that started
// it are gone. It then gives up everything.
func (n *nodes) serve() {
	if n == nil || n.listener < 0 {
		return
	}
	defer n.close()
	for {
		fds := []unix.PollFd{{Fd: int32(n.listener), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil {
			if errors.Is(err, unix.EINTR) {
				continue
			}
			glog.Warningf("guests cannot make sockets, fifos and devices on a share any more: poll: %v", err)
			return
		}
		if fds[0].Revents&unix.POLLIN == 0 {
			return // POLLHUP
		}
		var req notification
		if _, err := n.ioctl(unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&req)); err != nil {
			continue // it went away between the two calls, with its thread
		}
		n.answer(&req)
	}
}

func (n *nodes) ioctl(request uintptr, arg unsafe.Pointer) (int, error) {
	for {
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(n.listener), request, uintptr(arg))
		if errno == 0 {
			return int(r), nil
		}
		if errno != unix.EINTR {
			return -1, errno
		}
	}
}

// send answers a call; false if its thread is gone, or was interrupted and will
// ask again.
func (n *nodes) send(r response) bool {
	_, err := n.ioctl(unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&r))
	return err == nil
}

// valid tells whether the thread still waits in the call, so that what has been
// read of its memory was the call's.
func (n *nodes) valid(req *notification) bool {
	_, err := n.ioctl(unix.SECCOMP_IOCTL_NOTIF_ID_VALID, unsafe.Pointer(&req.id))
	return err == nil
}

// answer lets one call go on unless it is about a special file.
func (n *nodes) answer(req *notification) {
	resp := response{id: req.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
	if req.nr == unix.SYS_OPENAT {
		if n.open(req) {
			return
		}
	} else if i, mode, ok := n.chmodOf(req); ok {
		m := n.made[i]
		if !n.valid(req) {
			return
		}
		resp.flags = 0
		if err := unix.Chmod(procFD(m.node), mode); err != nil {
			var errno unix.Errno
			if !errors.As(err, &errno) {
				errno = unix.EIO
			}
			resp.err = -int32(errno)
		}
		if n.send(resp) {
			n.forget(i)
		}
		return
	}
	n.send(resp)
}

// open answers an open of a special file with a memfd; false if the call is
// not about one, and has not been answered.
func (n *nodes) open(req *notification) bool {
	dir := int32(req.args[0])
	name, ok := n.read(req.args[1], unix.NAME_MAX+1)
	if dir < 0 || !ok || name == "" || strings.Contains(name, "/") {
		return false
	}
	path := "fd/" + strconv.Itoa(int(dir)) + "/" + name
	var st unix.Stat_t
	if err := unix.Fstatat(n.proc, path, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil || !special(st.Mode) {
		return false
	}
	m, err := n.make(path)
	if err != nil {
		glog.Warningf("set mode of a special file for a guest: %v", err)
		return false
	}
	if m.node < 0 {
		return false
	}
	// In two steps, not in one by SECCOMP_ADDFD_FLAG_SEND: a signal to our thread,
	// and the Go runtime sends itself many, may interrupt that one between the
	// steps, and QEMU goes on with descriptor 0. Between these two only a signal
	// to QEMU's thread would leave a descriptor too many there; it blocks all.
	add := addFD{id: req.id, src: uint32(m.memfd), dstFlags: uint32(req.args[2]) & unix.O_CLOEXEC}
	fd, err := n.ioctl(unix.SECCOMP_IOCTL_NOTIF_ADDFD, unsafe.Pointer(&add))
	if err != nil {
		m.close()
		return false
	}
	if len(n.made) == maxNodes {
		n.forget(0)
	}
	n.made = append(n.made, m)
	n.send(response{id: req.id, val: int64(fd)})
	return true
}

// make opens the special file at path below QEMU's /proc directory, and something
// harmless for QEMU. The file may have become another one: its number is -1 if it
// is not special any more.
func (n *nodes) make(path string) (m madeNode, err error) {
	m.node, err = unix.Openat(n.proc, path, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return madeNode{node: -1}, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(m.node, &st); err != nil || !special(st.Mode) {
		_ = unix.Close(m.node)
		return madeNode{node: -1}, nil
	}
	if m.memfd, err = sealedMemfd(); err != nil {
		_ = unix.Close(m.node)
		return m, err
	}
	if err := unix.Fstat(m.memfd, &st); err != nil {
		m.close()
		return m, fmt.Errorf("stat memfd: %w", err)
	}
	m.ino, m.dev = st.Ino, st.Dev
	return m, nil
}

// sealedMemfd returns an empty file that stays empty.
func sealedMemfd() (int, error) {
	const flags, name = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING, "special file"
	fd, err := unix.MemfdCreate(name, flags|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // before kernel 6.3
		fd, err = unix.MemfdCreate(name, flags)
	}
	if err != nil {
		return -1, fmt.Errorf("make memfd: %w", err)
	}
	const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		_ = unix.Close(fd)
		return -1, fmt.Errorf("seal memfd: %w", err)
	}
	return fd, nil
}

// chmodOf finds the special file that a chmod is about.
func (n *nodes) chmodOf(req *notification) (i int, mode uint32, ok bool) {
	if len(n.made) == 0 {
		return 0, 0, false // as for nearly every call: regular files end here
	}
	for _, c := range chmodCalls {
		if int32(c.nr) != req.nr || c.flags >= 0 && uint32(req.args[c.flags]) != 0 {
			continue
		}
		path, ok := n.read(req.args[c.path], 32)
		if !ok {
			return 0, 0, false
		}
		number, ok := strings.CutPrefix(path, "/proc/self/fd/")
		if !ok {
			return 0, 0, false
		}
		fd, err := strconv.ParseUint(number, 10, 31)
		if err != nil {
			return 0, 0, false
		}
		var st unix.Stat_t
		if err := unix.Fstatat(n.proc, "fd/"+strconv.FormatUint(fd, 10), &st, 0); err != nil {
			return 0, 0, false
		}
		for i, m := range n.made {
			if m.ino == st.Ino && m.dev == st.Dev {
				return i, uint32(req.args[c.mode]) & 0o7777, true
			}
		}
	}
	return 0, 0, false
}

func (n *nodes) forget(i int) {
	n.made[i].close()
	n.made = append(n.made[:i], n.made[i+1:]...)
}

// read reads a string of QEMU's of less than size bytes.
func (n *nodes) read(address uint64, size int) (string, bool) {
	b := make([]byte, size)
	k, err := unix.Pread(n.mem, b, int64(address))
	if err != nil || k <= 0 {
		return "", false
	}
	s, _, ok := bytes.Cut(b[:k], []byte{0})
	return string(s), ok
}

func special(mode uint32) bool {
	switch mode & unix.S_IFMT {
	case unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFCHR, unix.S_IFBLK:
		return true
	}
	return false
}

func procFD(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// nodesFilter stops at the calls that nodes answers.
func nodesFilter() ([]unix.SockFilter, error) {
	// Offsets in struct seccomp_data. Both architectures are little endian, and
	// an int argument is the lower half of its 64 bits.
	const offNr, offArch, offArg2 = 0, 4, 16 + 2*8
	const allow, notify = 2, 1 // instructions from the end
	p := []bpf.Instruction{
		bpf.LoadAbsolute{Off: offArch, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: auditArch, SkipFalse: allow},
		bpf.LoadAbsolute{Off: offNr, Size: 4},
	}
	for _, c := range chmodCalls {
		p = append(p, bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(c.nr), SkipTrue: notify})
	}
	p = append(p,
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.SYS_OPENAT, SkipFalse: allow},
		bpf.LoadAbsolute{Off: offArg2, Size: 4},
		bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: ^uint32(flagsIgnored)},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: openFlags, SkipTrue: notify, SkipFalse: allow},
		bpf.RetConstant{Val: unix.SECCOMP_RET_ALLOW},
		bpf.RetConstant{Val: unix.SECCOMP_RET_USER_NOTIF},
	)
	// The two names stand for distances from the end until now.
	for i, in := range p {
		j, ok := in.(bpf.JumpIf)
		if !ok {
			continue
		}
		for _, skip := range []*uint8{&j.SkipTrue, &j.SkipFalse} {
			if *skip != 0 {
				*skip = uint8(len(p) - int(*skip) - i - 1)
			}
		}
		p[i] = j
	}
	raw, err := bpf.Assemble(p)
	if err != nil {
		return nil, fmt.Errorf("assemble system call filter: %w", err)
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		filter[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	return filter, nil
}

// kernelRelease is what uname says; empty if it does not.
func kernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// atLeast compares the two numbers that a kernel release begins with.
func atLeast(release string, major, minor int) bool {
	var a, b int
	if _, err := fmt.Sscanf(release, "%d.%d", &a, &b); err != nil {
		return false
	}
	return a > major || a == major && b >= minor
}
