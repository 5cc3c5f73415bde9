package client

import (
	"fmt"
	"net"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Console is a pty of the host between a caller's terminal and a stand-in. The
// real terminal is the one in the guest, so this one is raw and passes bytes.
type Console struct {
	Master, Slave *os.File
	// Name of the slave: /dev/pts/N.
	Name string
}

// NewConsole makes a pty of the given size; 0, 0 leaves the size unset.
func NewConsole(height, width uint16) (*Console, error) {
	// Non-blocking, so that Go's poller waits for bytes and Close ends a Read.
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("make console: open /dev/ptmx: %w", err)
	}
	c := &Console{Master: os.NewFile(uintptr(fd), "/dev/ptmx")}
	if err := c.open(fd, height, width); err != nil {
		c.Close()
		return nil, fmt.Errorf("make console: %w", err)
	}
	return c, nil
}

func (c *Console) open(fd int, height, width uint16) error {
	n, err := unix.IoctlGetUint32(fd, unix.TIOCGPTN)
	if err != nil {
		return fmt.Errorf("number of the pty: %w", err)
	}
	c.Name = "/dev/pts/" + strconv.Itoa(int(n))
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return fmt.Errorf("unlock the pty: %w", err)
	}
	// Through the master, so that it is its slave whatever /dev/pts is mounted.
	sfd, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		return fmt.Errorf("open the pty's slave: %w", errno)
	}
	c.Slave = os.NewFile(sfd, c.Name)
	t, err := unix.IoctlGetTermios(int(sfd), unix.TCGETS)
	if err != nil {
		return fmt.Errorf("attributes of the pty: %w", err)
	}
	// As cfmakeraw(3).
	t.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	t.Oflag &^= unix.OPOST
	t.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	t.Cflag &^= unix.CSIZE | unix.PARENB
	t.Cflag |= unix.CS8
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(int(sfd), unix.TCSETS, t); err != nil {
		return fmt.Errorf("make the pty raw: %w", err)
	}
	return c.Resize(height, width)
}

// Resize sets the size, which sends SIGWINCH to whoever runs on the slave.
func (c *Console) Resize(height, width uint16) error {
	if height == 0 && width == 0 {
		return nil
	}
	rc, err := c.Master.SyscallConn()
	if err != nil {
		return fmt.Errorf("resize console: %w", err)
	}
	cerr := rc.Control(func(fd uintptr) {
		err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: height, Col: width})
	})
	if err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("resize console: %w", err)
	}
	return nil
}

// CloseSlave closes this process's copy of the slave, once the stand-in has its
// own: reading from the master then ends with it.
func (c *Console) CloseSlave() {
	if c.Slave != nil {
		_ = c.Slave.Close()
		c.Slave = nil
	}
}

// Close closes what is open.
func (c *Console) Close() {
	c.CloseSlave()
	_ = c.Master.Close()
}

// Send passes the master to whoever listens on the unix socket at path, the
// slave's name being the message, as runc does it.
func (c *Console) Send(path string) error {
	// A blocking descriptor is what the receivers are used to. The flag belongs
	// to the open file, so this side must not read from the master any more.
	rc, err := c.Master.SyscallConn()
	if err != nil {
		return fmt.Errorf("console socket %s: %w", path, err)
	}
	s, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return fmt.Errorf("console socket %s: %w", path, err)
	}
	defer s.Close()
	cerr := rc.Control(func(fd uintptr) {
		if err = unix.SetNonblock(int(fd), false); err != nil {
			return
		}
		_, _, err = s.WriteMsgUnix([]byte(c.Name), unix.UnixRights(int(fd)), nil)
	})
	if err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("console socket %s: send the terminal: %w", path, err)
	}
	return nil
}
