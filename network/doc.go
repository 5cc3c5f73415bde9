// Package network connects a virtual machine's cards with the interfaces of a
// network namespace, and says as data what the guest has to configure.
//
//	        the pod's network namespace                 limbo
//	┌─────────────────────────────────────────┐   ┌──────────────┐
//	│  eth0 (veth, macvlan, …)    runv0 (tap) │   │ runv1, runv2 │
//	│    ingress ──── tc redirect ───▶ egress │   └──────────────┘
//	│    egress ◀──── tc redirect ─── ingress │   taps of cards that
//	└─────────────────────────────────│───────┘   have no interface yet
//	                                  │ file descriptor
//	                          the VM's card 0
//
// NewTaps makes a tap for each card before the hypervisor starts, in a network
// namespace of their own (limbo). A Namespace follows the interfaces of the
// pod's: beside each one it puts a tap and has the kernel pass every frame from
// one to the other, before the namespace's own IP stack sees it. The interface
// keeps its addresses, and the guest is given the same: its hardware address,
// IP addresses, routes, MTU. So whoever configures the namespace, and whoever
// looks into it, finds what it would find with any other runtime.
//
// What a Namespace changes it undoes in Close. What a process that was killed
// could not undo is only a filter that leads nowhere; Clean removes that.
//
// The package imports nothing of runv.
package network
