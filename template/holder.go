package template

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/golang/glog"

	"github.com/hyperhq/runv/hypervisor"
)

// The protocol between a template's holder and its users: SOCK_SEQPACKET on
// holder.sock, which only the template's owner can reach. A user sends one
// request, the holder one reply. With "acquire" two sealed memfds come with the
// reply, memory and device state, and the connection stays: its end is the end
// of the use.

// maxMessage bounds both messages, in bytes.
const maxMessage = 4096

// maxUsers bounds the connections of a holder.
const maxUsers = 1 << 14

// requestTime is how long a connection may take to say what it wants.
const requestTime = 10 * time.Second

type operation string

const (
	opAcquire operation = "acquire"
	opUsers   operation = "users"
	opEnd     operation = "end"
)

type request struct {
	Op operation `json:"op"`
}

type reply struct {
	Users int    `json:"users"`
	Error string `json:"error,omitempty"`
}

// Listen makes the socket of a holder for the template, for one that has none:
// see Hold. ErrHeld is wrapped if it has one.
func (t *Template) Listen(ctx context.Context) (*os.File, error) {
	if _, err := t.users(ctx); err == nil {
		return nil, fmt.Errorf("template %s: %w", t.path, ErrHeld)
	}
	l, err := listen(t.dir)
	if err != nil {
		return nil, fmt.Errorf("template %s: %w", t.path, err)
	}
	return l, nil
}

// Dir is the template's directory, for Hold.
func (t *Template) Dir() *os.File { return t.dir }

// listen puts a listening socket into dir, in place of one that was there.
func listen(dir *os.File) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("make socket: %w", err)
	}
	l := os.NewFile(uintptr(fd), socketFile)
	const fresh = "." + socketFile
	_ = unix.Unlinkat(int(dir.Fd()), fresh, 0)
	err = unix.Bind(fd, &unix.SockaddrUnix{Name: inDir(dir, fresh)})
	if err == nil {
		err = os.Chmod(inDir(dir, fresh), 0o600)
	}
	if err == nil {
		err = unix.Listen(fd, 128)
	}
	if err == nil {
		err = unix.Renameat(int(dir.Fd()), fresh, int(dir.Fd()), socketFile)
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("make %s: %w", socketFile, err)
	}
	return l, nil
}

// Hold is the holder of the template in dir: it reads the template, checks it,
// and hands it out on listener until ctx ends, somebody ends it (Remove, and
// Create with Force), or the manifest is deleted. It takes both descriptors
// over. It returns nil when it was ended, with all its goroutines.
func Hold(ctx context.Context, dir, listener *os.File) error {
	defer dir.Close()
	l, err := net.FileListener(listener)
	listener.Close()
	if err != nil {
		return fmt.Errorf("hold template: %w", err)
	}
	ul, ok := l.(*net.UnixListener)
	if !ok {
		l.Close()
		return errors.New("hold template: the listener is no unix socket")
	}
	ul.SetUnlinkOnClose(false)
	defer ul.Close()
	h := &holder{users: make(map[*net.UnixConn]bool), ended: make(chan struct{})}
	if err := h.load(ctx, dir); err != nil {
		return fmt.Errorf("hold template: %w", err)
	}
	defer h.memory.Close()
	defer h.device.Close()
	watch, err := watchManifest(dir)
	if err != nil {
		return fmt.Errorf("hold template: %w", err)
	}
	defer h.wg.Wait()
	defer watch.Close()
	h.wg.Go(func() {
		// Any event, or the file's close.
		_, _ = watch.Read(make([]byte, 4096))
		h.end()
	})
	stop := context.AfterFunc(ctx, h.end)
	defer stop()
	h.wg.Go(func() {
		<-h.ended
		h.close(ul)
	})
	defer h.end()
	for {
		conn, err := ul.AcceptUnix()
		if err != nil {
			select {
			case <-h.ended:
				return nil
			default:
				return fmt.Errorf("hold template: %w", err)
			}
		}
		if !h.add(conn) {
			conn.Close()
			continue
		}
		h.wg.Go(func() { h.serve(conn) })
	}
}

// watchManifest returns a file from which something can be read when the
// manifest is deleted.
func watchManifest(dir *os.File) (*os.File, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify: %w", err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	if _, err := unix.InotifyAddWatch(fd, inDir(dir, manifestFile), unix.IN_DELETE_SELF); err != nil {
		f.Close()
		return nil, fmt.Errorf("watch %s: %w", manifestFile, err)
	}
	return f, nil
}

// holder serves one template.
type holder struct {
	memory, device *os.File
	wg             sync.WaitGroup
	once           sync.Once
	ended          chan struct{} // closed by end

	mu    sync.Mutex
	open  []*net.UnixConn        // guarded by mu; every connection
	users map[*net.UnixConn]bool // guarded by mu; those that acquired
	shut  bool                   // guarded by mu
}

func (h *holder) load(ctx context.Context, dir *os.File) error {
	// A directory of its own: Close of the template must not close dir.
	own, err := os.Open(inDir(dir, "."))
	if err != nil {
		return err
	}
	t, err := openDir(dir.Name(), own)
	if err != nil {
		own.Close()
		return err
	}
	defer t.Close()
	s, err := t.load(ctx)
	if err != nil {
		return err
	}
	h.memory = s.Memory
	if h.device, err = hypervisor.NewMemory("runv-device", int64(len(s.Device))); err == nil {
		if _, err = h.device.WriteAt(s.Device, 0); err == nil {
			err = hypervisor.SealMemory(h.device)
		}
		if err != nil {
			h.device.Close()
		}
	}
	if err != nil {
		h.memory.Close()
	}
	return err
}

func (h *holder) end() { h.once.Do(func() { close(h.ended) }) }

// close ends every connection.
func (h *holder) close(l *net.UnixListener) {
	l.Close()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.shut = true
	for _, c := range h.open {
		c.Close()
	}
}

func (h *holder) add(c *net.UnixConn) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.shut || len(h.open) >= maxUsers {
		return false
	}
	h.open = append(h.open, c)
	return true
}

func (h *holder) drop(c *net.UnixConn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.users, c)
	for i, o := range h.open {
		if o == c {
			h.open[i] = h.open[len(h.open)-1]
			h.open = h.open[:len(h.open)-1]
			break
		}
	}
}

// count adds a user, if c is not nil, and returns how many there are.
func (h *holder) count(c *net.UnixConn) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c != nil {
		h.users[c] = true
	}
	n := 0
	for u := range h.users {
		if !hungUp(u) {
			n++
		}
	}
	return n
}

// hungUp tells whether the other side has gone, also if the goroutine that
// waits for it has not run yet.
func hungUp(c *net.UnixConn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return true
	}
	var gone bool
	err = raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(p, 0)
		gone = err == nil && n > 0 && p[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0
	})
	return gone || err != nil
}

func (h *holder) serve(c *net.UnixConn) {
	defer c.Close()
	defer h.drop(c)
	if err := sameUser(c); err != nil {
		glog.Warningf("template: connection refused: %v", err)
		return
	}
	buf := make([]byte, maxMessage)
	_ = c.SetReadDeadline(time.Now().Add(requestTime))
	n, err := c.Read(buf)
	if err != nil || n == 0 {
		return
	}
	_ = c.SetReadDeadline(time.Time{})
	req, err := decodeRequest(buf[:n])
	if err != nil {
		_ = h.answer(c, reply{Error: err.Error()})
		return
	}
	switch req.Op {
	case opUsers:
		_ = h.answer(c, reply{Users: h.count(nil)})
	case opEnd:
		_ = h.answer(c, reply{Users: h.count(nil)})
		h.end()
	case opAcquire:
		if h.answer(c, reply{Users: h.count(c)}, h.memory, h.device) != nil {
			return
		}
		// Nothing more is said: this returns when the user has gone.
		_, _ = c.Read(buf)
	}
}

func decodeRequest(b []byte) (request, error) {
	var r request
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("decode request: %w", err)
	}
	switch r.Op {
	case opAcquire, opUsers, opEnd:
		return r, nil
	}
	return r, fmt.Errorf("request is %.20q, want acquire, users or end", r.Op)
}

// sameUser lets only root and the holder's own user in, whatever the mode of
// the socket has become.
func sameUser(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); cerr != nil || err != nil {
		return errors.Join(cerr, err)
	}
	if cred.Uid != 0 && int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("user %d is not %d", cred.Uid, os.Geteuid())
	}
	return nil
}

func (h *holder) answer(c *net.UnixConn, r reply, files ...*os.File) error {
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	var fds []int
	for _, f := range files {
		fds = append(fds, int(f.Fd()))
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	_ = c.SetWriteDeadline(time.Now().Add(requestTime))
	_, _, err = c.WriteMsgUnix(b, rights, nil)
	return err
}

// call connects to the holder, sends a request and reads the reply. Without an
// error, conn and files are the caller's to close.
func (t *Template) call(ctx context.Context, op operation) (conn *net.UnixConn, r reply, files []*os.File, err error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unixpacket", t.at(socketFile))
	if err != nil {
		var errno unix.Errno
		if errors.As(err, &errno) {
			err = errno
		}
		return nil, r, nil, fmt.Errorf("it has no holder (%w)", err)
	}
	conn = c.(*net.UnixConn)
	defer func() {
		if err != nil {
			closeAll(files)
			files = nil
			conn.Close()
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
		}
	}()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	b, err := json.Marshal(request{Op: op})
	if err != nil {
		return conn, r, nil, err
	}
	if _, err := conn.Write(b); err != nil {
		return conn, r, nil, fmt.Errorf("ask its holder: %w", err)
	}
	buf, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*4))
	n, oobn, _, _, err := conn.ReadMsgUnix(buf, oob)
	files = received(oob[:oobn])
	if err == nil && n == 0 {
		err = errors.New("it ended")
	}
	if err != nil {
		return conn, r, files, fmt.Errorf("ask its holder: %w", err)
	}
	if err := json.Unmarshal(buf[:n], &r); err != nil {
		return conn, r, files, fmt.Errorf("ask its holder: %w", err)
	}
	if r.Error != "" {
		return conn, r, files, fmt.Errorf("its holder says: %s", text(r.Error))
	}
	return conn, r, files, nil
}

// received takes the descriptors out of a control message.
func received(oob []byte) []*os.File {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	var files []*os.File
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "runv-template"))
		}
	}
	return files
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// ask gets the snapshot from the holder, with the connection that says that it
// is used.
func (t *Template) ask(ctx context.Context) (*hypervisor.Snapshot, *net.UnixConn, error) {
	conn, _, files, err := t.call(ctx, opAcquire)
	if err != nil {
		return nil, nil, err
	}
	s, err := t.accept(files)
	if err != nil {
		closeAll(files)
		conn.Close()
		return nil, nil, fmt.Errorf("what its holder gave: %w", err)
	}
	return s, conn, nil
}

// accept makes a snapshot of what the holder sent.
func (t *Template) accept(files []*os.File) (*hypervisor.Snapshot, error) {
	if len(files) != 2 {
		return nil, fmt.Errorf("%d files, want 2", len(files))
	}
	memory, device := files[0], files[1]
	s := &hypervisor.Snapshot{
		Memory: memory, MemoryBytes: t.manifest.MemoryBytes,
		Device: make([]byte, t.manifest.DeviceBytes), Fingerprint: t.manifest.Fingerprint,
	}
	if _, err := device.ReadAt(s.Device, 0); err != nil {
		return nil, fmt.Errorf("read device state: %w", err)
	}
	if hashBytes(s.Device) != t.manifest.DeviceSHA256 {
		return nil, fmt.Errorf("%w: the device state is another one", ErrDamaged)
	}
	if err := s.Check(); err != nil {
		return nil, err
	}
	device.Close()
	return s, nil
}

// Users returns how many use the template, and whether it has a holder to know
// that.
func (t *Template) Users(ctx context.Context) (n int, held bool) {
	n, err := t.users(ctx)
	return n, err == nil
}

func (t *Template) users(ctx context.Context) (int, error) {
	conn, r, files, err := t.call(ctx, opUsers)
	if err != nil {
		return 0, err
	}
	closeAll(files)
	conn.Close()
	return r.Users, nil
}

// end ends the holder and waits until it has.
func (t *Template) end(ctx context.Context) (int, error) {
	conn, r, files, err := t.call(ctx, opEnd)
	if err != nil {
		return 0, err
	}
	closeAll(files)
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	_, _ = conn.Read(make([]byte, 1))
	return r.Users, nil
}
