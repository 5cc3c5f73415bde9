// Package seccomp compiles the seccomp section of an OCI configuration into the
// classic BPF program that the kernel loads. It runs on the host, so that the
// guest agent has nothing to do but to load it, and needs neither cgo nor
// libseccomp.
//
// What a profile means is what libseccomp and runc make of it; the rules are
// listed at Compile. A program reads the system call's number and then takes a
// binary search to its rules: the filter runs at every system call of the
// container, and a profile of Docker's size has some 350 of them.
package seccomp
