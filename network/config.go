package network

import (
	"net"
	"net/netip"
)

// Config is what the guest has to configure.
type Config struct {
	Interfaces []Interface
	Routes     []Route
	Neighbours []Neighbour
}

// Interface is one of the namespace that a card of the VM stands for.
type Interface struct {
	// Slot is the number of the card.
	Slot int
	// Index is the kernel's, in the pod's namespace on the host.
	Index int
	Name  string
	MAC   net.HardwareAddr
	MTU   int
	// Up is what was asked of the interface, Carrier whether there is somebody
	// at the other end.
	Up, Carrier bool
	NoARP       bool
	Addresses   []Address
}

// Address of an interface.
type Address struct {
	Prefix netip.Prefix
	// Peer is the far end of a point-to-point link; Prefix is then one address.
	Peer      netip.Prefix
	Broadcast netip.Addr
	// Scope is RT_SCOPE_*.
	Scope         uint8
	NoPrefixRoute bool
}

// Route of the main table. Those that a kernel makes itself, for addresses and
// router advertisements, are not listed: the guest's does so too.
type Route struct {
	Destination netip.Prefix // of 0 bits: the default route
	// Interface is empty for a Type that discards packets, and with NextHops.
	Interface       string
	Gateway, Source netip.Addr
	Metric, MTU     int
	// Scope is RT_SCOPE_*, Type RTN_*, Protocol RTPROT_*.
	Scope, Type, Protocol uint8
	OnLink                bool
	NextHops              []NextHop
}

// NextHop is one of several ways of a route.
type NextHop struct {
	Interface string
	Gateway   netip.Addr
	Weight    int
	OnLink    bool
}

// Neighbour is a permanent entry of the ARP or NDP table.
type Neighbour struct {
	Interface string
	IP        netip.Addr
	MAC       net.HardwareAddr
}
