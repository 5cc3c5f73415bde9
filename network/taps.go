package network

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// MaxCards bounds the cards of a VM.
const MaxCards = 16

const (
	tunDevice = "/dev/net/tun"
	// tapPrefix and a card's number are the name of its tap.
	tapPrefix = "runv"
)

// Taps are the host's ends of a VM's cards. A tap lives as long as somebody has
// its file open; in limbo it even outlives that, which makes the end of a
// hypervisor quicker: the kernel takes 15 ms or so to remove one interface, and
// removes those of a namespace that nobody has any more together, later.
type Taps struct {
	files []*os.File
	limbo *os.File
	h     *netlink.Handle // of limbo
}

// NewTaps makes n taps, each of which takes frames with a virtio-net header.
func NewTaps(n int) (_ *Taps, err error) {
	if n < 1 || n > MaxCards {
		return nil, fmt.Errorf("make %d taps: want 1 to %d", n, MaxCards)
	}
	t := new(Taps)
	defer func() {
		if err != nil {
			t.Close()
		}
	}()
	err = inNamespace(nil, func() error {
		if t.limbo, err = own(); err != nil {
			return err
		}
		if t.h, err = handle(); err != nil {
			return err
		}
		for i := range n {
			f, err := newTap(tapName(i))
			if err != nil {
				return fmt.Errorf("make tap: %w", err)
			}
			t.files = append(t.files, f)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return t, nil
}

// newTap makes a tap in the calling thread's network namespace.
func newTap(name string) (*os.File, error) {
	// In blocking mode, so that Go leaves the mode alone: QEMU, which inherits
	// the same open file, sets its own.
	fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) {
		return nil, fmt.Errorf("open %s: %w; load the module tun", tunDevice, err)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", tunDevice, err)
	}
	f := os.NewFile(uintptr(fd), name)
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err == nil {
		err = unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return f, nil
}

func tapName(slot int) string { return tapPrefix + strconv.Itoa(slot) }

// isTapName tells whether a tap of NewTaps is called so.
func isTapName(name string) bool {
	n, err := strconv.Atoi(strings.TrimPrefix(name, tapPrefix))
	return err == nil && n >= 0 && tapName(n) == name
}

// Files are the taps' files, card by card. They stay the Taps'; a hypervisor
// inherits them.
func (t *Taps) Files() []*os.File { return t.files }

// move takes a tap to a namespace, down and without addresses. In the pod's it
// has to vanish with its files whatever happens, in limbo it need not.
func (t *Taps) move(slot int, from *netlink.Handle, to *os.File) error {
	name := tapName(slot)
	l, err := from.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find tap %s: %w", name, err)
	}
	if err := t.persist(slot, 0); err != nil {
		return err
	}
	if err := from.LinkSetNsFd(l, int(to.Fd())); err != nil {
		return fmt.Errorf("move tap %s: %w", name, err)
	}
	if same(to, t.limbo) {
		return t.persist(slot, 1)
	}
	return nil
}

func (t *Taps) persist(slot, on int) error {
	if err := unix.IoctlSetInt(int(t.files[slot].Fd()), unix.TUNSETPERSIST, on); err != nil {
		return fmt.Errorf("make tap %s persistent (%d): %w", tapName(slot), on, err)
	}
	return nil
}

// Close gives the taps up. They are gone when the hypervisor is, too.
func (t *Taps) Close() {
	for _, f := range t.files {
		f.Close()
	}
	if t.h != nil {
		t.h.Close()
	}
	if t.limbo != nil {
		t.limbo.Close()
	}
}
