package network

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// priority of this package's filters: the mark by which they are found again.
// A foreign program's filters for the same interface come before it.
const priority = 0x7276

// ingress is where frames that an interface receives pass, before anything else
// of the kernel looks at them but packet sockets.
const ingress = netlink.HANDLE_MIN_INGRESS

// redirect lets the kernel pass every frame that from receives to be sent by the
// interface with index to. It tells whether from had no ingress queue before.
//
// u32 with a key of no bits and matchall do the same; Debian's kernels have both
// as modules, others only one.
func redirect(h *netlink.Handle, from netlink.Link, to int) (made bool, err error) {
	a := from.Attrs()
	q := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: a.Index, Parent: netlink.HANDLE_INGRESS, Handle: netlink.MakeHandle(0xffff, 0)}}
	switch err := h.QdiscAdd(q); {
	case err == nil:
		made = true
	case errors.Is(err, unix.EEXIST), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EBUSY):
		// There is one, ingress or clsact, which has the same place for filters;
		// if it is something else, adding the filter says so.
	default:
		return false, fmt.Errorf("add ingress queue to %s: %w", a.Name, err)
	}
	attrs := netlink.FilterAttrs{LinkIndex: a.Index, Parent: ingress, Priority: priority, Protocol: unix.ETH_P_ALL}
	err = h.FilterAdd(&netlink.U32{FilterAttrs: attrs, Actions: []netlink.Action{netlink.NewMirredAction(to)}})
	if errors.Is(err, unix.ENOENT) {
		err = h.FilterAdd(&netlink.MatchAll{FilterAttrs: attrs, Actions: []netlink.Action{netlink.NewMirredAction(to)}})
	}
	if err != nil {
		if made {
			_ = h.QdiscDel(q)
		}
		return false, fmt.Errorf("redirect what %s receives: %w", a.Name, err)
	}
	return made, nil
}

// restore takes back what redirect did to the interface with this index.
func restore(h *netlink.Handle, index int, made bool) error {
	var err error
	if made {
		err = h.QdiscDel(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Parent: netlink.HANDLE_INGRESS, Handle: netlink.MakeHandle(0xffff, 0)}})
	} else {
		err = delFilter(h, index)
	}
	if gone(err) {
		return nil
	}
	return err
}

func delFilter(h *netlink.Handle, index int) error {
	attrs := netlink.FilterAttrs{LinkIndex: index, Parent: ingress, Priority: priority, Protocol: unix.ETH_P_ALL}
	err := h.FilterDel(&netlink.U32{FilterAttrs: attrs})
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		err = h.FilterDel(&netlink.MatchAll{FilterAttrs: attrs})
	}
	return err
}

// gone tells whether an error says that there was nothing any more to act on.
func gone(err error) bool {
	var missing netlink.LinkNotFoundError
	return errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) || errors.As(err, &missing)
}

// redirected finds this package's filter of an interface. others counts the
// filters that are not this package's.
func redirected(h *netlink.Handle, l netlink.Link) (to int, is bool, others int, err error) {
	filters, err := h.FilterList(l, ingress)
	if err != nil {
		if gone(err) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
			err = nil // no ingress queue
		}
		return 0, false, 0, err
	}
	for _, f := range filters {
		if f.Attrs().Priority != priority {
			others++
			continue
		}
		is = true
		var actions []netlink.Action
		switch f := f.(type) {
		case *netlink.U32:
			actions = f.Actions
		case *netlink.MatchAll:
			actions = f.Actions
		}
		for _, a := range actions {
			if m, ok := a.(*netlink.MirredAction); ok {
				to = m.Ifindex
			}
		}
	}
	return to, is, others, nil
}
