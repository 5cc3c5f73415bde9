// Package containerdshim is containerd's runtime v2 shim for pods of runv: the
// process that containerd starts once per pod and asks, over a unix socket, to
// make, run, signal and remove containers (Task API v3, and v2 for daemons before
// containerd 2.0). The supervisor of the pod runs in the same process.
//
//	containerd ──ttrpc──▶ containerd-shim-runv-v2    service: tasks, events, stdio
//	                        │  package client, over the pod's own sockets
//	                        ├─ package supervisor     holds the VM
//	                        ├─ stand-in (child)       one per process, has the fifos
//	                        └─ qemu (child)
//
// The service is a client of its own supervisor, like the command line is: the
// pod has the same directory, records and sockets, so `runv --root … list`,
// exec and the like work on it. Output never passes through the service: the
// stand-in has containerd's fifos as its own descriptors.
//
// containerd's library (pkg/shim) brings the server, the log, the connection for
// events and the handling of signals; `start` is done here, because the library
// serves only daemons of its own generation. docs/containerd.md has the whole
// picture.
package containerdshim
