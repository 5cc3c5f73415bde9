// Package bundle turns a bundle on this host into the request that makes a
// container of it: the command line and the containerd shim have it in common.
//
// What config.json means is package ocispec's business, which looks at nothing
// but its text. Here is what has to be looked up on the host: the file itself,
// the configured guest image, namespaces and devices.
package bundle

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/client"
	"github.com/hyperhq/runv/config"
	"github.com/hyperhq/runv/ocispec"
	"github.com/hyperhq/runv/state"
)

// SpecFile is the name of a bundle's configuration.
const SpecFile = "config.json"

// Load reads the configuration of a bundle. dir is absolute.
func Load(dir string) (*specs.Spec, error) {
	if st, err := os.Stat(dir); err != nil {
		return nil, fmt.Errorf("bundle: %w", err)
	} else if !st.IsDir() {
		return nil, fmt.Errorf("bundle: %s is not a directory", dir)
	}
	f, err := os.Open(filepath.Join(dir, SpecFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("JSON specification file %s not found in %s", SpecFile, dir)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return ocispec.Load(f)
}

// Options is what Request needs beside the bundle.
type Options struct {
	ID string
	// Dir is the bundle, absolute.
	Dir    string
	Config *config.Config
	// SystemdCgroup says that cgroupsPath is one of systemd's.
	SystemdCgroup bool
	NoPivot       bool
	// Pod is the sandbox container whose pod the container joins, if a person
	// said so; empty: config.json alone decides.
	Pod string
	// Rootfs is ocispec.Options.Rootfs.
	Rootfs *ocispec.RootfsDisk
	// Pods tells which containers could be joined; nil: none.
	Pods Pods
	// Warn gets what the caller should know although it is no failure.
	Warn func(line string)
}

// Request reads a bundle and says what a container made of it needs: the
// request, and the network namespace as client.CreateOptions has it.
func Request(o Options) (*specs.Spec, *supervisorv1.CreateRequest, string, error) {
	if err := state.ValidateID(o.ID); err != nil {
		return nil, nil, "", err
	}
	spec, err := Load(o.Dir)
	if err != nil {
		return nil, nil, "", err
	}
	vm, err := VM(o.Config)
	if err != nil {
		return nil, nil, "", err
	}
	pod, err := findPod(&o, spec)
	if err != nil {
		return nil, nil, "", err
	}
	sandboxID := o.ID
	if s := pod.sandbox; s != nil {
		sandboxID = s.ID
		vm.Vcpus, vm.MemoryMib = s.VCPUs, s.MemoryMiB
	}
	req, err := ocispec.Translate(spec, ocispec.Options{
		ID:            o.ID,
		SandboxID:     sandboxID,
		Shared:        pod.shared,
		Namespace:     pod.owner(spec),
		SharedMemory:  sharedMemory,
		Bundle:        o.Dir,
		VM:            vm,
		MaxVCPUs:      uint32(runtime.NumCPU()),
		MaxMemoryMiB:  hostMemoryMiB(),
		SystemdCgroup: o.SystemdCgroup,
		NoPivot:       o.NoPivot,
		HostDevice:    hostDevice,
		BlockDevice:   blockDevice,
		Rootfs:        o.Rootfs,
		Warn:          o.Warn,
	})
	if err != nil {
		return nil, nil, "", err
	}
	if req.Cgroup != nil {
		req.Cgroup.Required = o.Config.RequireCgroup
	}
	network, err := pod.network(spec, req.GetVm().GetNetwork() == ocispec.NetworkUser)
	return spec, req, network, err
}

// SandboxOf returns the sandbox container whose pod the container of a bundle
// joins; its own id if it has a pod of its own.
func SandboxOf(o Options) (string, error) {
	spec, err := Load(o.Dir)
	if err != nil {
		return "", err
	}
	pod, err := findPod(&o, spec)
	if err != nil {
		return "", err
	}
	if pod.sandbox == nil {
		return o.ID, nil
	}
	return pod.sandbox.ID, nil
}

// Inherit gives a process from a file what it leaves open, as runc does: the
// capabilities, limits and score of the container whose bundle is dir.
func Inherit(p *specs.Process, dir string) (*specs.Process, error) {
	if p.Capabilities != nil && p.Rlimits != nil && p.OOMScoreAdj != nil {
		return p, nil
	}
	spec, err := Load(dir)
	if err != nil {
		return nil, err
	}
	if spec.Process == nil {
		return p, nil
	}
	if p.Capabilities == nil {
		p.Capabilities = spec.Process.Capabilities
	}
	if p.Rlimits == nil {
		p.Rlimits = spec.Process.Rlimits
	}
	if p.OOMScoreAdj == nil {
		p.OOMScoreAdj = spec.Process.OOMScoreAdj
	}
	return p, nil
}

// hostDevice tells whether a listed device is hardware of this host: it is there
// under that path with those numbers, and is none of those that every kernel has.
// Numbers that name nothing here are the container's own business.
func hostDevice(path, typ string, major, minor int64) bool {
	if ocispec.VirtualDevice(typ, major, minor) {
		return false
	}
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return false
	}
	want := uint32(unix.S_IFCHR)
	if typ == "b" {
		want = unix.S_IFBLK
	}
	return st.Mode&unix.S_IFMT == want && st.Rdev == unix.Mkdev(uint32(major), uint32(minor))
}

// blockDevice finds the node of a block device of this host that has a medium.
func blockDevice(major, minor int64) string {
	dir := fmt.Sprintf("/sys/dev/block/%d:%d/", major, minor)
	size, err := os.ReadFile(dir + "size")
	if err != nil || strings.TrimSpace(string(size)) == "0" {
		return ""
	}
	text, err := os.ReadFile(dir + "uevent")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(text)) {
		name, ok := strings.CutPrefix(strings.TrimSpace(line), "DEVNAME=")
		if !ok {
			continue
		}
		var st unix.Stat_t
		node := "/dev/" + name
		if err := unix.Stat(node, &st); err == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == unix.Mkdev(uint32(major), uint32(minor)) {
			return node
		}
	}
	return ""
}

// hostMemoryMiB is how much memory this host has.
func hostMemoryMiB() uint32 {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return 0 // ocispec's own bound
	}
	return uint32(uint64(si.Totalram) * uint64(si.Unit) >> 20)
}

// network is the network namespace that a configuration asks for, as
// client.CreateOptions has it, and the field that says so.
func network(spec *specs.Spec) (path, field string, err error) {
	if spec.Linux == nil {
		return client.NetworkHost, "", nil
	}
	for i, ns := range spec.Linux.Namespaces {
		if ns.Type != specs.NetworkNamespace {
			continue
		}
		if ns.Path == "" {
			return client.NetworkNew, "", nil
		}
		field := fmt.Sprintf("linux.namespaces[%d].path", i)
		if err := checkNetwork(ns.Path); err != nil {
			return "", "", fmt.Errorf("%s: %w", field, err)
		}
		return ns.Path, field, nil
	}
	return client.NetworkHost, "", nil
}

// checkNetwork says why path is not a network namespace, if it is none.
func checkNetwork(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer unix.Close(fd)
	if typ, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE); err != nil || typ != unix.CLONE_NEWNET {
		return fmt.Errorf("%s is not a network namespace", path)
	}
	return nil
}

// VM is what a configuration says of virtual machines. The files are looked
// for here, where the answer can say what to do.
func VM(c *config.Config) (*supervisorv1.VM, error) {
	for _, f := range []struct{ key, path string }{{"kernel", c.Kernel}, {"initrd", c.Initrd}} {
		st, err := os.Stat(f.path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil, fmt.Errorf("guest %s %s does not exist: make it with 'runv manage build-guest', or name another with --%s", f.key, f.path, f.key)
		case err != nil:
			return nil, fmt.Errorf("guest %s: %w", f.key, err)
		case !st.Mode().IsRegular():
			return nil, fmt.Errorf("guest %s %s is not a regular file", f.key, f.path)
		}
	}
	kernel, err := filepath.Abs(c.Kernel)
	if err != nil {
		return nil, fmt.Errorf("guest kernel: %w", err)
	}
	initrd, err := filepath.Abs(c.Initrd)
	if err != nil {
		return nil, fmt.Errorf("guest initrd: %w", err)
	}
	vm := &supervisorv1.VM{
		Driver: c.Driver, Machine: c.Machine, Kernel: kernel, Initrd: initrd, KernelParams: c.KernelParams,
		Vcpus: uint32(c.VCPUs), MemoryMib: uint32(c.Memory), Transport: c.Transport, Network: c.Network, Nics: uint32(c.NICs),
		QemuPath: c.QEMU, QemuSandbox: c.QEMUSandbox, Share: c.Share, Virtiofsd: c.Virtiofsd,
		BootTimeoutMs: uint32(time.Duration(c.BootTimeout).Milliseconds()),
	}
	dir := c.TemplateDir()
	if len(c.Entries()) > 0 {
		vm.Factory, vm.TemplatePolicy = c.Factory, c.TemplatePolicy
		dir = c.TemplatesDir()
	}
	if dir != "" {
		if vm.Template, err = filepath.Abs(dir); err != nil {
			return nil, fmt.Errorf("template: %w", err)
		}
		vm.TemplatePolicy = c.TemplatePolicy
	}
	return vm, nil
}
