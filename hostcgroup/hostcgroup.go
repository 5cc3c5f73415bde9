// Package hostcgroup keeps the processes that make up a container on the host
// (its stand-ins, and for a pod's first container the supervisor and the
// hypervisor) in the cgroup that config.json names, so that whoever looks at the
// host's cgroups sees what the container really uses, and so that a guest that
// breaks out of its own limits meets the host's.
//
// It works with cgroup v1 and v2, through the file system or through systemd;
// github.com/opencontainers/cgroups, the code of runc, does that. What is here
// is what differs in a VM: the limits leave room for the VM itself, rules for
// devices are the guest's business, and processes join later than the cgroup is
// made.
//
// A Group is used by one goroutine at a time.
package hostcgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	godbus "github.com/godbus/dbus/v5"
	"github.com/opencontainers/cgroups"
	cgroupfs "github.com/opencontainers/cgroups/fs"
	"github.com/opencontainers/cgroups/fs2"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/cgroups/systemd"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// What a VM needs beside what its container is allowed. docs/limits.md has the
// measurements.
const (
	// MemoryOverhead is added to limits of memory, in bytes: the guest's kernel
	// and agent, the heap and the translated code of the hypervisor, supervisor
	// and stand-ins.
	MemoryOverhead = 512 << 20
	// MemoryShare: one part in so many of a limit is added too, since a larger
	// guest has more to keep books of (1/64 of its memory is the kernel's array
	// of pages).
	MemoryShare = 32
	// LeastPids is the lowest limit of tasks that is set. The container's own is
	// kept in the guest; on the host count threads of the hypervisor (up to 64 of
	// them serve files), of the supervisor and of the stand-ins, and none of
	// these survives that it cannot make another.
	LeastPids = 512
)

// ErrUnavailable is wrapped by errors that say that this host does not let
// cgroups be written; a container can do without.
var ErrUnavailable = errors.New("the cgroup cannot be used")

// Group is a container's cgroup on the host. Its directories need not exist.
type Group struct {
	m      cgroups.Manager
	name   string
	origin map[string]string // where the calling process was before it joined
}

// config is what the library is told. path and id are those of New.
func config(path, id string, viaSystemd bool) (*cgroups.Cgroup, error) {
	c := &cgroups.Cgroup{Systemd: viaSystemd, Resources: &cgroups.Resources{SkipDevices: true}}
	switch {
	case viaSystemd && path == "":
		c.ScopePrefix, c.Name = "runv", id
	case viaSystemd:
		parts := strings.Split(path, ":")
		if len(parts) != 3 {
			return nil, fmt.Errorf("linux.cgroupsPath: is %q, want slice:prefix:name, as --systemd-cgroup asks", path)
		}
		if _, err := systemd.ExpandSlice(parts[0]); parts[0] != "" && parts[0] != "-.slice" && err != nil {
			return nil, fmt.Errorf("linux.cgroupsPath: %q is not the name of a slice", parts[0])
		}
		c.Parent, c.ScopePrefix, c.Name = parts[0], parts[1], parts[2]
		if c.Name == "" {
			return nil, fmt.Errorf("linux.cgroupsPath: %q names no unit", path)
		}
	case path == "":
		c.Name = id
	default:
		// As runc does it: what is absolute is below the root of each hierarchy,
		// what is relative below the cgroup of the calling process, and neither
		// leaves it.
		clean := filepath.Clean("/" + path)
		if clean == "/" {
			return nil, fmt.Errorf("linux.cgroupsPath: %q is the root of the hierarchy, want a cgroup below it", path)
		}
		if !filepath.IsAbs(path) {
			clean = clean[1:]
		}
		c.Path = clean
	}
	return c, nil
}

// New describes the cgroup at linux.cgroupsPath. An empty path stands for one
// beside or below the cgroup of the calling process, named by id, as runc
// chooses. Nothing is made yet.
func New(path, id string, viaSystemd bool) (*Group, error) {
	c, err := config(path, id, viaSystemd)
	if err != nil {
		return nil, err
	}
	if viaSystemd && !systemd.IsRunningSystemd() {
		return nil, errors.New("--systemd-cgroup: systemd is not running on this host")
	}
	var m cgroups.Manager
	if !cgroups.IsCgroup2UnifiedMode() && !viaSystemd {
		m, err = newV1(c)
	} else {
		m, err = manager.New(c)
	}
	if err != nil {
		return nil, fmt.Errorf("cgroup %q: %w: %w", path, ErrUnavailable, err)
	}
	return &Group{m: m, name: display(path, id)}, nil
}

func newV1(c *cgroups.Cgroup) (cgroups.Manager, error) {
	m, err := cgroupfs.NewManager(c, nil)
	if err != nil {
		return nil, err
	}
	if len(m.GetPaths()) == 0 {
		return nil, errors.New("no hierarchy of cgroup v1 is mounted")
	}
	return m, nil
}

// newV2 is for a hierarchy that is mounted elsewhere; tests use it.
func newV2(c *cgroups.Cgroup, dir string) (*Group, error) {
	m, err := fs2.NewManager(c, dir)
	if err != nil {
		return nil, err
	}
	return &Group{m: m, name: dir}, nil
}

func display(path, id string) string {
	if path == "" {
		return id
	}
	return path
}

// Make makes the cgroup and moves processes into it. On an error nothing is
// left of it, unless it was there before. The calling process may be one of them:
// see Leave.
func (g *Group) Make(pids ...int) (err error) {
	if len(pids) == 0 {
		return errors.New("make cgroup: no process is to join it")
	}
	before, err := places(os.Getpid())
	if err != nil {
		return fmt.Errorf("make cgroup %s: %w: %w", g.name, ErrUnavailable, err)
	}
	// What is there already is somebody else's: with systemd, removing it would
	// end every process in it.
	existed := len(g.made()) > 0
	defer func() {
		if err != nil {
			g.Leave(pids...)
			if !existed {
				_ = g.Remove()
			}
		}
	}()
	err = g.m.Apply(pids[0])
	if err == nil {
		err = g.joinDevices(pids[0])
	}
	g.findOrigin(before, pids[0])
	if err != nil {
		return fmt.Errorf("make cgroup %s: %w", g.name, unavailable(err))
	}
	return g.Add(pids[1:]...)
}

// Add moves further processes into the cgroup. One that has ended is left out.
func (g *Group) Add(pids ...int) error {
	for _, pid := range pids {
		if in, err := g.holds(pid); in || errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := g.add(pid); err != nil {
			return fmt.Errorf("move process %d into cgroup %s: %w", pid, g.name, unavailable(err))
		}
	}
	return nil
}

func (g *Group) add(pid int) error {
	for _, dir := range g.made() {
		err := cgroups.WriteCgroupProc(dir, pid)
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// joinDevices does what the library leaves out if a cgroup is to have no rules
// for devices: what looks for a container's processes often looks there.
func (g *Group) joinDevices(pid int) error {
	dir := g.m.Path("devices")
	if c, err := g.m.GetCgroups(); err != nil || c.Systemd || dir == "" || cgroups.IsCgroup2UnifiedMode() {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return cgroups.WriteCgroupProc(dir, pid)
}

// made are the directories that are there, by controller.
func (g *Group) made() map[string]string {
	dirs := make(map[string]string)
	for controller, dir := range g.m.GetPaths() {
		if isCgroup(dir) {
			dirs[controller] = dir
		}
	}
	return dirs
}

// holds says whether a process is in the cgroup already, which is much cheaper
// to read than to write.
func (g *Group) holds(pid int) (bool, error) {
	in, all, err := g.count(pid)
	return all > 0 && in == all, err
}

// partly says whether a process is in the cgroup in some hierarchies.
func (g *Group) partly(pid int) bool {
	in, _, err := g.count(pid)
	return err == nil && in > 0
}

// count says in how many of the cgroup's hierarchies a process is.
func (g *Group) count(pid int) (in, all int, err error) {
	now, err := places(pid)
	if err != nil {
		return 0, 0, err
	}
	paths := g.made()
	for controller, dir := range paths {
		if at := place(now, controller); at != "" && at != "/" && (dir == at || strings.HasSuffix(dir, at)) {
			in++
		}
	}
	return in, len(paths), nil
}

// Leave moves processes of the cgroup to where the calling process was before
// Make, so that the cgroup can be removed. Those that are elsewhere stay there.
func (g *Group) Leave(pids ...int) {
	for _, pid := range pids {
		if in, err := g.holds(pid); !in || err != nil {
			// Make may have got through to a part of the hierarchies only.
			if err != nil || !g.partly(pid) {
				continue
			}
		}
		for _, dir := range g.origin {
			// One that was removed meanwhile has a parent that was not.
			for ; len(dir) > 1; dir = filepath.Dir(dir) {
				err := cgroups.WriteCgroupProc(dir, pid)
				if err == nil || errors.Is(err, unix.ESRCH) {
					break
				}
			}
		}
	}
}

// place is the cgroup of a process in one hierarchy, from /proc/PID/cgroup.
// The library calls the hierarchy "name=systemd" "systemd".
func place(at map[string]string, controller string) string {
	if p, ok := at[controller]; ok {
		return p
	}
	return at["name="+controller]
}

func places(pid int) (map[string]string, error) {
	return cgroups.ParseCgroupFile(filepath.Join("/proc", strconv.Itoa(pid), "cgroup"))
}

// findOrigin notes the directories that the calling process was in, given its
// places, now that a process is in the cgroup: that process's place is the end
// of the cgroup's directory, and what is before it is the hierarchy's root.
func (g *Group) findOrigin(before map[string]string, inside int) {
	now, err := places(inside)
	if err != nil {
		return
	}
	g.origin = make(map[string]string)
	for controller, dir := range g.made() {
		if root, ok := strings.CutSuffix(dir, place(now, controller)); ok {
			g.origin[controller] = filepath.Join(root, place(before, controller))
		}
	}
}

// Dirs are the directories of the cgroup, for Remove after this process's end.
func (g *Group) Dirs() []string {
	var dirs []string
	for _, d := range g.m.GetPaths() {
		if d != "" && !slices.Contains(dirs, d) {
			dirs = append(dirs, d)
		}
	}
	slices.Sort(dirs)
	return dirs
}

// OOMKills counts how many processes of the cgroup the host's kernel has killed
// for want of memory, the cgroup's or the host's. known is false where nobody
// counts them: the controller of memory is not to be had.
func (g *Group) OOMKills() (n uint64, known bool) {
	n, err := g.m.OOMKillCount()
	return n, err == nil
}

// Remove removes the cgroup, once no process is in it.
func (g *Group) Remove() error { return Remove(g.Dirs()) }

// removeWait bounds how long processes that were killed may take to be gone.
const removeWait = 2 * time.Second

// Remove removes directories of cgroups. Those that are gone are no error.
// Nothing below them is touched: runv makes nothing there.
func Remove(dirs []string) error {
	deadline := time.Now().Add(removeWait)
	var there []string
	for _, dir := range dirs {
		if filepath.IsAbs(dir) && isCgroup(dir) {
			there = append(there, dir)
		}
	}
	if err := stopScopes(there, deadline); err != nil {
		return err
	}
	var errs []error
	for _, dir := range there {
		if err := retry(deadline, unix.EBUSY, func() error { return unix.Rmdir(dir) }); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("remove cgroup %s: %w", dir, err))
		}
	}
	return errors.Join(errs...)
}

// retry calls f again for as long as it fails with an error of a kind.
func retry(deadline time.Time, kind error, f func() error) error {
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := f()
		if !errors.Is(err, kind) || time.Now().After(deadline) {
			return err
		}
		<-time.After(pause)
	}
}

// stopScopes has systemd forget the scopes that cgroups are of, once no process
// is in them. If somebody else removes the directory of one first, systemd does
// not notice that it is empty, and keeps it, and so its name, for good.
func stopScopes(dirs []string, deadline time.Time) error {
	if !systemd.IsRunningSystemd() {
		return nil
	}
	scopes := make(map[string][]string) // with v1 each has several directories
	for _, dir := range dirs {
		if unit := filepath.Base(dir); strings.HasSuffix(unit, scopeSuffix) {
			scopes[unit] = append(scopes[unit], dir)
		}
	}
	var errs []error
	for unit, dirs := range scopes {
		err := retry(deadline, unix.EBUSY, func() error {
			for _, dir := range dirs {
				if populated(dir) {
					return unix.EBUSY
				}
			}
			return nil
		})
		if err == nil {
			err = stopUnit(unit)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("remove scope %s: %w", unit, err))
		}
	}
	return errors.Join(errs...)
}

const scopeSuffix = ".scope"

// stopWait bounds how long systemd may take to stop a unit without processes.
const stopWait = 10 * time.Second

// stopUnit has systemd stop and forget a unit. One that it does not know is no
// error. (The library's own function takes every error for that one.)
func stopUnit(unit string) error {
	ctx, cancel := context.WithTimeout(context.Background(), stopWait)
	defer cancel()
	conn, err := dbus.NewWithContext(ctx)
	if err != nil {
		return fmt.Errorf("ask systemd: %w", err)
	}
	defer conn.Close()
	result := make(chan string, 1)
	if _, err := conn.StopUnitContext(ctx, unit, "replace", result); err != nil {
		if isUnknownUnit(err) {
			return nil
		}
		return fmt.Errorf("ask systemd to stop it: %w", err)
	}
	select {
	case r := <-result:
		if r != "done" {
			return fmt.Errorf("systemd does not stop it: %s", r)
		}
	case <-ctx.Done():
		return fmt.Errorf("systemd does not stop it: %w", context.Cause(ctx))
	}
	// One that has failed is kept until somebody has taken notice.
	if err := conn.ResetFailedUnitContext(ctx, unit); err != nil && !isUnknownUnit(err) {
		return fmt.Errorf("ask systemd to forget it: %w", err)
	}
	return nil
}

func isUnknownUnit(err error) bool {
	var e godbus.Error
	return errors.As(err, &e) && e.Name == "org.freedesktop.systemd1.NoSuchUnit"
}

// populated says whether a process is in a cgroup; with v2, also in those below.
func populated(dir string) bool {
	if b, err := os.ReadFile(filepath.Join(dir, "cgroup.events")); err == nil {
		return strings.Contains(string(b), "populated 1")
	}
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	return err == nil && len(b) > 0
}

// isCgroup says whether dir is a directory of a cgroup hierarchy below its root.
func isCgroup(dir string) bool {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return false
	}
	if int64(st.Type) != unix.CGROUP_SUPER_MAGIC && int64(st.Type) != unix.CGROUP2_SUPER_MAGIC {
		return false
	}
	var own, parent unix.Stat_t
	return unix.Stat(dir, &own) == nil && unix.Stat(filepath.Dir(dir), &parent) == nil && own.Dev == parent.Dev
}

// unavailable marks errors that mean that nobody could write this cgroup here,
// in contrast to those of a value that the kernel refuses.
func unavailable(err error) error {
	for _, e := range []error{fs.ErrPermission, fs.ErrNotExist, unix.EROFS, unix.EBUSY, unix.EOPNOTSUPP, unix.ENODEV, unix.ENOSYS} {
		if errors.Is(err, e) {
			return fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
	}
	return err
}

// Fields names the limits that a cgroup of the host would keep.
func Fields(r *specs.LinuxResources) []string {
	var fields []string
	for _, p := range parts {
		if _, ok := p.of(r); ok {
			fields = append(fields, p.field)
		}
	}
	return fields
}

// Any says whether resources hold a limit that a cgroup of the host has.
func Any(r *specs.LinuxResources) bool {
	return len(Fields(r)) > 0
}
