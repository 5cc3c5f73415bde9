// Package agent is the guest's side of runv: the first process of the VM.
//
// Boot makes the guest usable (file systems, modules, loopback). An Agent then
// serves one connection of the host after the other: yamux on one byte stream,
// ttrpc on one of its streams, raw bytes of a process's stdio on the others.
// What a request asks of the kernel goes through two small interfaces, so that
// all else is testable without a VM: System is the guest as a whole, Engine
// builds containers (package agent/container has the real one).
//
// What lives how long:
//
//	guest ──────────────────────────────────────────────────▶ VM ends
//	Agent: containers, processes, their exits ──────────────▶
//	session: one connection ──▶ ends, waits for the next
//	stream: control or stdio ──▶
//
// A session's end takes nothing with it but its streams: processes go on, block
// when their pipes are full, and a later session may attach to them.
//
// This package imports nothing of runv but api/agent and agent/spawn.
package agent
