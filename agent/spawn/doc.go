// Package spawn makes a child process the way a container needs it and Go's
// own fork does not offer: the child can wait before it executes its program,
// joins namespaces while it has one thread, is born inside a cgroup, and drops
// its privileges in the order that the kernel wants.
//
// Start clones the calling thread, so that the child inherits what belongs to
// a thread: its namespaces, root and working directory. A caller that changed
// those has locked its goroutine to the thread (runtime.LockOSThread).
//
// The child is a copy of this process with one thread and without the heap, in
// which the Go runtime is dead: no allocation, no stack growth, no locks. All
// that it does between clone and execve is in child.go: raw system calls with
// arguments that were made ready before, on a stack and with memory of its own
// (box.go). It reports over a close-on-exec pipe:
//
//	child                                    parent
//	clone ─ setns ─ descriptors ─ ┐
//	                              ├─ go ◀─── id maps, rlimits, scheduler, oom score
//	unshare ─ root in user ns ─── ┤
//	                              ├─ held ─▶ Start returns      (Spec.Hold)
//	                              ├─ go ◀─── Child.Proceed or Child.Exec
//	session ─ tty ─ privileges ── ┤
//	                              ├─ ready ▶ Start (or Proceed) returns
//	                              ├─ go ◀─── Child.Release      (Spec.Wait)
//	seccomp ─ execve              └─ closes ▶ Child.ExecError returns
//
// Each step that fails is reported as {step, errno} and ends the child. The
// child never outlives an undecided parent: it ends when the pipe that it
// waits on closes. Reaping is the caller's.
package spawn
