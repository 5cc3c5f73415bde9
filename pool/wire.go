package pool

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/state"
)

// SocketFile is where the factory listens, in its directory.
const SocketFile = "factory.sock"

const (
	// maxFrame bounds a message, in bytes.
	maxFrame = 64 << 10
	// maxFiles bounds the descriptors that come with one.
	maxFiles = claimFiles + 1
	// claimFiles come with a claim, in the order of Handover.
	claimFiles = 6
	// requestTime is how long a connection may take to say what it wants.
	requestTime = 2 * time.Second
)

// taken is the frame of a creator that takes a standby, and of a claimed
// supervisor that ends in order.
var taken = []byte{1}

// descriptors are owned numbers: os.File would change the mode of what others
// share with us.
type descriptors []int

func (d descriptors) close() {
	for _, fd := range d {
		_ = unix.Close(fd)
	}
}

// send writes one frame.
func send(c *net.UnixConn, m proto.Message, fds ...int) error {
	b, err := proto.Marshal(m)
	if err != nil {
		return err
	}
	if len(b) > maxFrame {
		return fmt.Errorf("message has %d bytes, at most %d are allowed", len(b), maxFrame)
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	_, _, err = c.WriteMsgUnix(b, rights, nil)
	return err
}

// receive reads one frame. The descriptors are the caller's if there is no error.
func receive(c *net.UnixConn, m proto.Message) (descriptors, error) {
	buf, oob := make([]byte, maxFrame), make([]byte, unix.CmsgSpace(4*maxFiles))
	n, oobn, flags, _, err := c.ReadMsgUnix(buf, oob)
	fds := rightsOf(oob[:oobn])
	switch {
	case err == nil && n == 0:
		err = io.EOF
	case err == nil && flags&unix.MSG_TRUNC != 0:
		err = fmt.Errorf("message has more than %d bytes", maxFrame)
	case err == nil && (flags&unix.MSG_CTRUNC != 0 || len(fds) > maxFiles):
		err = fmt.Errorf("message has more than %d descriptors, or there is no room for them", maxFiles)
	case err == nil:
		err = proto.Unmarshal(buf[:n], m)
	}
	if err != nil {
		fds.close()
		return nil, err
	}
	return fds, nil
}

// rightsOf takes the descriptors out of a control message. They are
// close-on-exec already.
func rightsOf(oob []byte) descriptors {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	var fds descriptors
	for _, m := range messages {
		if more, err := unix.ParseUnixRights(&m); err == nil {
			fds = append(fds, more...)
		}
	}
	return fds
}

// checkRequest reports the first field of a request that cannot be right.
func checkRequest(req *supervisorv1.FactoryRequest, fds int) error {
	want := 0
	switch a := req.Ask.(type) {
	case *supervisorv1.FactoryRequest_Claim:
		want = claimFiles
		if err := checkClaim(a.Claim); err != nil {
			return err
		}
	case *supervisorv1.FactoryRequest_Status, *supervisorv1.FactoryRequest_Stop:
	default:
		return errors.New("the request asks for nothing that is known")
	}
	if fds != want {
		return fmt.Errorf("the request has %d descriptors, want %d", fds, want)
	}
	return nil
}

func checkClaim(c *supervisorv1.Claim) error {
	if err := state.ValidateID(c.GetSandboxId()); err != nil {
		return err
	}
	switch {
	case c.Vm == nil:
		return errors.New("vm is missing")
	case !filepath.IsAbs(c.Root):
		return fmt.Errorf("root is %q, want an absolute path", c.Root)
	case len(c.Namespaces) != len(namespaceKinds):
		return fmt.Errorf("%d namespaces, want %d", len(c.Namespaces), len(namespaceKinds))
	}
	return nil
}

// namespaceKinds are those that a supervisor inherits and cannot be given
// afterwards. Mounts are another matter, see Handover.
var namespaceKinds = []string{"net", "pid", "user", "uts", "ipc", "cgroup"}

// namespaces are the calling process's.
func namespaces() []string {
	names := make([]string, len(namespaceKinds))
	for i, k := range namespaceKinds {
		// What cannot be read is like nothing but itself.
		names[i], _ = os.Readlink("/proc/self/ns/" + k)
	}
	return names
}

// address is the name of the socket below an open directory: a socket's path has
// 107 bytes at most.
func address(dir *os.File, name string) string {
	return "/proc/self/fd/" + strconv.Itoa(int(dir.Fd())) + "/" + name
}

// ErrNone is wrapped if no factory runs in a directory.
var ErrNone = errors.New("no factory runs")

// dial connects to the factory in dir. It never waits: a factory that does not
// accept has a full queue.
func dial(dir string) (*net.UnixConn, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%w in %s", ErrNone, dir)
	}
	d := os.NewFile(uintptr(fd), dir)
	defer d.Close()
	conn, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: address(d, SocketFile), Net: "unixpacket"})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED) {
		return nil, fmt.Errorf("%w in %s", ErrNone, dir)
	}
	if err != nil {
		return nil, fmt.Errorf("connect to the factory in %s: %w", dir, err)
	}
	return conn, nil
}

// bound lets what is done with conn end with ctx. The returned function undoes it.
func bound(ctx context.Context, conn *net.UnixConn) (stop func() bool) {
	return context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
}

// why is the context's reason if that is what ended a call.
func why(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, os.ErrDeadlineExceeded) {
		return context.Cause(ctx)
	}
	return err
}
