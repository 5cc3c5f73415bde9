// Package container builds OCI containers inside the guest and runs processes
// in them. It is the only place of the agent that touches namespaces, mounts,
// cgroups, devices and pseudo-terminals.
//
// A container is described by one agentv1.CreateContainerRequest, which the
// host has validated and translated; what would be dangerous here is checked
// again (see Validate).
//
// # How a container comes to be
//
//	agent                       thread of the container                  init process
//	─────                       ───────────────────────                  ────────────
//	cgroup, limits
//	mount sources as fds
//	new locked thread ────────▶ join and unshare namespaces
//	                            root file system over "/", mounts,
//	                            devices, createContainer hooks,
//	                            pivot_root, masks, working directory
//	                            spawn ─────────────────────────────────▶ privileges, waits
//	Create returns
//	Start ────────────────────▶ startContainer hooks
//	                            (the thread ends)
//	     └─────────────────────────────────────────────────────────────▶ execve
//
// No program is executed for that: starting one costs more than all the rest.
// A thread cannot enter a user namespace while the agent has others, so a
// container with one is built by a second process, `runv-agent container-init`
// (see RunInit), which does exactly the same in the namespace.
//
// # Paths
//
// The file systems of a container are hostile. Every path in them is resolved
// by openat2(2) with RESOLVE_IN_ROOT and RESOLVE_NO_MAGICLINKS and used by its
// descriptor; the mount API works on descriptors throughout. /proc is used
// through a descriptor of the guest's own instance: on a thread, /proc/self is
// another task.
//
// # Ownership
//
// Every method of a Container may be called from any goroutine. Children are
// reaped by package spawn.
package container
