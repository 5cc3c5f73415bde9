package network

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ErrNoCard is wrapped by Sync's error for interfaces that there is no card for.
var ErrNoCard = errors.New("no network card is left for it")

// Namespace is a pod's network namespace with the cards of its VM beside its
// interfaces. Its methods may be called from any goroutine.
type Namespace struct {
	ns   *os.File
	h    *netlink.Handle
	taps *Taps

	mu    sync.Mutex // guards the fields below
	slots []slot     // by number of the card
}

// slot is a card's connection; the zero value is none.
type slot struct {
	index int // of the interface
	made  bool
	mtu   int
}

// Open takes a namespace for the cards of a VM. ns and taps stay the caller's;
// both are needed until Close.
func Open(ns *os.File, taps *Taps) (*Namespace, error) {
	n := &Namespace{ns: ns, taps: taps, slots: make([]slot, len(taps.files))}
	err := inNamespace(ns, func() (err error) {
		n.h, err = handle()
		return err
	})
	if err != nil {
		return nil, err
	}
	return n, nil
}

// Sync makes the connections fit the interfaces that there are now, and returns
// what the guest has to configure. An interface keeps its card as long as it
// exists. One that has never been up has none: programs that configure one set
// it up last. With an error that wraps ErrNoCard the Config is there all the
// same, without the interfaces that the error names.
func (n *Namespace) Sync() (*Config, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f, err := scan(n.h)
	if err != nil {
		return nil, err
	}
	for i, s := range n.slots {
		if s.index == 0 {
			continue
		}
		l := f.link(s.index)
		if l == nil || unfitNow(f, l) {
			if err := n.disconnect(i); err != nil {
				return nil, err
			}
			continue
		}
		if mtu := l.Attrs().MTU; mtu != s.mtu {
			if err := n.setMTU(i, mtu); err != nil {
				return nil, err
			}
		}
	}
	var problems []error
	for _, l := range n.missing(f) {
		i := slices.IndexFunc(n.slots, func(s slot) bool { return s.index == 0 })
		if i < 0 {
			problems = append(problems, n.noCard(l))
			continue
		}
		if err := n.connect(f, i, l); err != nil {
			if gone(err) && !n.exists(l) {
				continue // its end will be told
			}
			return nil, err
		}
	}
	return f.config(n.indices()), errors.Join(problems...)
}

func unfitNow(f *found, l netlink.Link) bool {
	why, _ := f.unfit(l)
	return why != ""
}

func (n *Namespace) noCard(l netlink.Link) error {
	return fmt.Errorf("interface %s: %w: the virtual machine has %d, and all are in use", l.Attrs().Name, ErrNoCard, len(n.slots))
}

func (n *Namespace) exists(l netlink.Link) bool {
	_, err := n.h.LinkByIndex(l.Attrs().Index)
	return err == nil
}

func (n *Namespace) indices() []int {
	var list []int
	for _, s := range n.slots {
		list = append(list, s.index)
	}
	return list
}

// missing are the interfaces that are up and have no card, in the order in which
// the kernel numbers them.
func (n *Namespace) missing(f *found) []netlink.Link {
	var list []netlink.Link
	for _, l := range f.links {
		a := l.Attrs()
		if a.Flags&net.FlagUp != 0 && !unfitNow(f, l) && !slices.Contains(n.indices(), a.Index) {
			list = append(list, l)
		}
	}
	slices.SortFunc(list, func(a, b netlink.Link) int { return cmp.Compare(a.Attrs().Index, b.Attrs().Index) })
	return list
}

// connect puts card i's tap beside an interface.
func (n *Namespace) connect(f *found, i int, l netlink.Link) (err error) {
	a := l.Attrs()
	if err := n.reclaim(f, l); err != nil {
		return err
	}
	var undo []func()
	defer func() {
		if err != nil {
			for _, u := range slices.Backward(undo) {
				u()
			}
			err = fmt.Errorf("connect interface %s with the virtual machine: %w", a.Name, err)
		}
	}()
	if err := n.taps.move(i, n.taps.h, n.ns); err != nil {
		return err
	}
	undo = append(undo, func() { _ = n.taps.move(i, n.h, n.taps.limbo) })
	tap, err := n.h.LinkByName(tapName(i))
	if err != nil {
		return err
	}
	// It is a wire: the namespace's own IP stack has nothing to say on it.
	if err := n.h.LinkSetIP6AddrGenMode(tap, addrGenNone); err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EAFNOSUPPORT) {
		return fmt.Errorf("keep IPv6 from %s: %w", tapName(i), err)
	}
	if err := n.h.LinkSetMTU(tap, a.MTU); err != nil {
		return fmt.Errorf("set mtu %d of %s: %w", a.MTU, tapName(i), err)
	}
	if err := n.h.LinkSetTxQLen(tap, txQueue); err != nil {
		return fmt.Errorf("set queue length of %s: %w", tapName(i), err)
	}
	if err := n.h.LinkSetUp(tap); err != nil {
		return fmt.Errorf("set %s up: %w", tapName(i), err)
	}
	if _, err := redirect(n.h, tap, a.Index); err != nil { // goes with the tap's queue when it is moved
		return err
	}
	undo = append(undo, func() { _ = restore(n.h, tap.Attrs().Index, true) })
	made, err := redirect(n.h, l, tap.Attrs().Index)
	if err != nil {
		return err
	}
	n.slots[i] = slot{index: a.Index, made: made, mtu: a.MTU}
	return nil
}

const (
	// addrGenNone is IN6_ADDR_GEN_MODE_NONE.
	addrGenNone = 1
	// txQueue is how many frames wait in a tap for the guest, as in any other
	// Ethernet interface; a tap's default is half of that.
	txQueue = 1000
)

// reclaim removes what a supervisor that was killed left at an interface, and
// refuses one that another lives on.
func (n *Namespace) reclaim(f *found, l netlink.Link) error {
	to, is, others, err := redirected(n.h, l)
	if err != nil || !is {
		return err
	}
	if to != 0 && f.link(to) != nil {
		return fmt.Errorf("interface %s belongs to another pod's virtual machine already (by %s)", l.Attrs().Name, f.link(to).Attrs().Name)
	}
	return forget(n.h, l, others)
}

// forget removes a filter that leads nowhere, and its queue if that has nothing
// else and is of the kind that redirect makes.
func forget(h *netlink.Handle, l netlink.Link, others int) error {
	index := l.Attrs().Index
	qs, err := h.QdiscList(l)
	if err != nil {
		return err
	}
	plain := slices.ContainsFunc(qs, func(q netlink.Qdisc) bool { return q.Attrs().Parent == netlink.HANDLE_INGRESS && q.Type() == "ingress" })
	return restore(h, index, plain && others == 0)
}

// disconnect takes card i from its interface, which may be gone.
func (n *Namespace) disconnect(i int) error {
	s := n.slots[i]
	if err := restore(n.h, s.index, s.made); err != nil {
		return fmt.Errorf("disconnect card %d: %w", i, err)
	}
	tap, err := n.h.LinkByName(tapName(i))
	if err != nil {
		return fmt.Errorf("disconnect card %d: %w", i, err)
	}
	if err := restore(n.h, tap.Attrs().Index, true); err != nil {
		return fmt.Errorf("disconnect card %d: %w", i, err)
	}
	if err := n.taps.move(i, n.h, n.taps.limbo); err != nil {
		return err
	}
	n.slots[i] = slot{}
	return nil
}

func (n *Namespace) setMTU(i, mtu int) error {
	tap, err := n.h.LinkByName(tapName(i))
	if err == nil {
		err = n.h.LinkSetMTU(tap, mtu)
	}
	if err != nil {
		return fmt.Errorf("set mtu %d of %s: %w", mtu, tapName(i), err)
	}
	n.slots[i].mtu = mtu
	return nil
}

// Status is an interface of the namespace and what became of it.
type Status struct {
	Interface
	// Added by Add.
	Added bool
	// Kind is the kernel's word for what made it: veth, macvlan and so on.
	Kind string
	// Slot of Interface is -1 if no card stands for it; Problem says why.
	Problem string
}

// Status lists the interfaces of the namespace but those that every one has.
func (n *Namespace) Status() ([]Status, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f, err := scan(n.h)
	if err != nil {
		return nil, err
	}
	var list []Status
	for _, l := range f.links {
		a := l.Attrs()
		why, mine := f.unfit(l)
		if mine {
			continue
		}
		slots := n.indices()
		i := slices.Index(slots, a.Index)
		s := Status{Kind: l.Type(), Added: added(l)}
		if i >= 0 {
			s.Interface = f.config(slots).Interfaces[slices.IndexFunc(f.config(slots).Interfaces, func(x Interface) bool { return x.Index == a.Index })]
		} else {
			s.Interface = f.config([]int{a.Index}).Interfaces[0]
			s.Slot = -1
			switch {
			case why != "":
				s.Problem = why
			case !s.Up:
				s.Problem = "has never been up"
			case !slices.Contains(slots, 0):
				s.Problem = "all " + strconv.Itoa(len(slots)) + " network cards of the virtual machine are in use"
			}
		}
		list = append(list, s)
	}
	return list, nil
}

// Close leaves the namespace as it was found. The hypervisor should have ended:
// frames that it sends go nowhere.
func (n *Namespace) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	var errs []error
	for i, s := range n.slots {
		if s.index != 0 {
			if err := restore(n.h, s.index, s.made); err != nil {
				errs = append(errs, fmt.Errorf("restore interface %d: %w", s.index, err))
			}
		}
		// A hypervisor that was taken over could have made it outlive itself.
		if l, err := n.h.LinkByName(tapName(i)); err == nil && s.index != 0 {
			if err := n.h.LinkDel(l); err != nil && !gone(err) {
				errs = append(errs, fmt.Errorf("remove %s: %w", tapName(i), err))
			}
		}
		n.slots[i] = slot{}
	}
	if links, err := n.h.LinkList(); err == nil {
		errs = append(errs, takeAllAway(n.h, links))
	}
	n.h.Close()
	return errors.Join(errs...)
}

func takeAllAway(h *netlink.Handle, links []netlink.Link) error {
	var errs []error
	for _, l := range links {
		if added(l) {
			errs = append(errs, takeAway(h, l))
		}
	}
	return errors.Join(errs...)
}

// Clean removes from a namespace what a supervisor that was killed has left. It
// leaves what belongs to a virtual machine that lives.
func Clean(ns *os.File) error {
	var h *netlink.Handle
	err := inNamespace(ns, func() (err error) {
		h, err = handle()
		return err
	})
	if err != nil {
		return err
	}
	defer h.Close()
	f, err := scan(h)
	if err != nil {
		return err
	}
	var errs []error
	lives := false
	for _, l := range f.links {
		a := l.Attrs()
		if l.Type() == "tuntap" && isTapName(a.Name) {
			if a.RawFlags&unix.IFF_LOWER_UP != 0 {
				lives = true
			} else { // nobody has it open
				if err := h.LinkDel(l); err != nil && !gone(err) {
					errs = append(errs, fmt.Errorf("remove %s: %w", a.Name, err))
				}
			}
			continue
		}
		to, is, others, err := redirected(h, l)
		if err == nil && is && (to == 0 || f.link(to) == nil) {
			err = forget(h, l, others)
		}
		if err != nil && !gone(err) {
			errs = append(errs, fmt.Errorf("restore interface %s: %w", a.Name, err))
		}
	}
	if !lives {
		errs = append(errs, takeAllAway(h, f.links))
	}
	return errors.Join(errs...)
}

// Cards is how many interfaces the VM can have.
func (n *Namespace) Cards() int { return len(n.slots) }
