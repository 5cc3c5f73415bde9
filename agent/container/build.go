package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"sort"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/agent/spawn"
	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/trace"
)

// inputs is all that the construction of a container takes from the agent's
// namespaces, as descriptors, so that it works from within a user namespace.
type inputs struct {
	req   *agentv1.CreateContainerRequest
	share string // Env.ShareDir, for hooks

	proc   *os.File         // the guest's /proc
	cgroup *os.File         // nil: the process that builds is in it already
	rootfs *os.File         // detached mounts from here on
	mounts map[int]*os.File // by index into req.Mounts: sources of bind mounts, cgroup
	// source opens such a source, nil for other mounts. Newer kernels list
	// mounts in the order in which they were cloned, so each is when its turn
	// comes; a builder in a user namespace has no source but all of mounts.
	source func(m *agentv1.Mount) (*os.File, error)
	resolv *os.File // nil: no resolv.conf is to be mounted
	nodes  map[string]*os.File
	joins  map[agentv1.Namespace_Type]*os.File
	stdio  Stdio

	// inUser says that the builder is in the container's user namespace.
	inUser bool
	// sibling makes init a child of the builder's parent.
	sibling bool
}

// close gives back all descriptors but those of joined namespaces and stdio,
// which are others'.
func (in *inputs) close() {
	for _, f := range []*os.File{in.proc, in.rootfs, in.resolv} {
		if f != nil {
			_ = f.Close()
		}
	}
	for _, f := range in.mounts {
		_ = f.Close()
	}
	for _, f := range in.nodes {
		_ = f.Close()
	}
}

// builder builds one container on one thread.
type builder struct {
	in   *inputs
	plan nsPlan
	root rootDir // the container's root, from when it is attached

	l       *localBuild // what it becomes
	oldRoot *os.File
	procfs  *os.File // made by init
	// procMounted says that procfs is in its place.
	procMounted bool
	open        closers
	later       []func() error // what makes mounts read-only at the end
	plain       []*os.File     // mounts that have no propagation of their own
}

// localBuild is a container built on a thread of this process.
type localBuild struct {
	thread  *thread // nil when it is needed no more
	in      *inputs
	child   *spawn.Child
	console *os.File
	rootFD  *os.File
}

// buildLocal builds the container and leaves init waiting.
func buildLocal(ctx context.Context, in *inputs) (_ *localBuild, err error) {
	l := &localBuild{thread: newThread(), in: in}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	b := &builder{in: in, plan: planNamespaces(in.req)}
	defer func() { _ = b.open.close() }()
	end := trace.Begin(ctx, "build")
	err = l.thread.do(func() error { return b.build(ctx, l) })
	end()
	if err != nil {
		return nil, err
	}
	if len(in.req.GetHooks().GetStartContainer()) == 0 {
		l.thread.close()
		l.thread = nil
	}
	return l, nil
}

func (l *localBuild) start(ctx context.Context) error {
	if l.thread != nil {
		end := trace.Begin(ctx, "startContainer hooks")
		err := l.thread.do(func() error {
			return runHooks(ctx, "startContainer", l.in.req.GetHooks().GetStartContainer(), l.in, "created", nil)
		})
		end()
		if err != nil {
			return err
		}
	}
	// Its user, capabilities, seccomp filter and execve.
	defer trace.Begin(ctx, "exec")()
	if err := l.child.Release(); err != nil {
		return processError(err, l.in.req.GetProcess())
	}
	return processError(l.child.ExecError(), l.in.req.GetProcess())
}

func (l *localBuild) close() {
	if l.thread != nil {
		l.thread.close()
		l.thread = nil
	}
	if l.child != nil {
		l.child.Close()
	}
	if l.rootFD != nil {
		_ = l.rootFD.Close()
		l.rootFD = nil
	}
	if l.in != nil {
		l.in.close()
		l.in = nil
	}
}

// build runs on the container's thread.
func (b *builder) build(ctx context.Context, l *localBuild) error {
	req := b.in.req
	b.l = l
	// One phase after the other.
	end := trace.Begin(ctx, "namespaces")
	phase := func(name string) {
		end()
		end = trace.Begin(ctx, name)
	}
	defer func() { end() }()
	if err := b.namespaces(); err != nil {
		return err
	}
	if err := b.identity(); err != nil {
		return err
	}
	phase("first process")
	p := &preparation{process: req.GetProcess(), stdio: b.in.stdio, seccomp: req.GetSeccomp(), proc: b.in.proc, unlimited: b.in.sibling}
	defer p.close()
	if err := b.firstProcess(p); err != nil {
		return err
	}
	phase("mounts")
	if err := b.attachRoot(); err != nil {
		return err
	}
	p.root = b.root
	for i, m := range req.GetMounts() {
		if err := b.mount(i, m); err != nil {
			return fmt.Errorf("mounts[%d]: mount %q at %q: %w", i, mountName(m), m.GetDestination(), err)
		}
	}
	phase("devices")
	if err := b.devices(); err != nil {
		return err
	}
	phase("other files")
	if err := b.resolvConf(); err != nil {
		return fmt.Errorf("mount resolv.conf of the guest: %w", err)
	}
	if err := b.workDir(); err != nil {
		return err
	}
	if hooks := req.GetHooks().GetCreateContainer(); len(hooks) > 0 {
		phase("createContainer hooks")
		if err := b.createHooks(ctx, hooks); err != nil {
			return err
		}
	}
	phase("masked and read-only paths")
	for _, p := range req.GetReadonlyPaths() {
		if err := b.readonlyPath(p); err != nil {
			return fmt.Errorf("readonly_paths: %q: %w", p, err)
		}
	}
	for _, p := range req.GetMaskedPaths() {
		if err := b.maskPath(p); err != nil {
			return fmt.Errorf("masked_paths: %q: %w", p, err)
		}
	}
	if req.GetProcess().GetTerminal() {
		// Its node is mounted over /dev/console, so it is allocated before the
		// root becomes read-only.
		if err := p.openTerminal(); err != nil {
			return err
		}
		if err := b.bindConsole(p.slave); err != nil {
			return fmt.Errorf("mount terminal at \"/dev/console\": %w", err)
		}
	}
	for _, f := range b.later {
		if err := f(); err != nil {
			return err
		}
	}
	if req.GetRootfs().GetReadOnly() {
		if err := setAttr(b.root.dir, unix.MOUNT_ATTR_RDONLY, 0, false); err != nil {
			return fmt.Errorf("rootfs: %w", err)
		}
	}
	phase("pivot")
	if err := b.pivot(); err != nil {
		return fmt.Errorf("rootfs: change the root: %w", err)
	}
	if err := b.rootPropagation(); err != nil {
		return fmt.Errorf("rootfs: %w", err)
	}
	root, err := os.Open("/")
	if err != nil {
		return fmt.Errorf("rootfs: %w", err)
	}
	l.rootFD = root
	phase("init process")
	if err := b.finish(p); err != nil {
		return err
	}
	l.console = p.takeConsole()
	return nil
}

// finish tells init its program, or makes it where it does not exist yet.
func (b *builder) finish(p *preparation) error {
	program, err := p.program()
	if err != nil {
		return err
	}
	if b.l.child != nil {
		return processError(b.l.child.Exec(program), p.process)
	}
	spec := p.spec(program)
	b.adapt(spec)
	b.l.child, err = spawn.Start(spec)
	return processError(err, p.process)
}

// adapt adds to the spec of init what belongs to the container.
func (b *builder) adapt(spec *spawn.Spec) {
	spec.UnshareFlags = uintptr(b.plan.child)
	spec.CgroupFD = b.in.cgroup
	spec.Wait = true
	spec.Sibling = b.in.sibling
	for _, typ := range childJoins {
		if ns := b.in.joins[typ]; ns != nil {
			spec.Setns = append(spec.Setns, ns)
		}
	}
}

// firstProcess makes init before the mounts if one of them is the proc file
// system of another pid namespace than the agent's, which only a process in
// there can make. It waits for its program until finish.
func (b *builder) firstProcess(p *preparation) error {
	if b.plan.unshare&unix.CLONE_NEWPID == 0 && b.in.joins[agentv1.Namespace_TYPE_PID] == nil {
		return nil
	}
	for i, m := range b.in.req.GetMounts() {
		if isBind(m) || m.GetType() != "proc" {
			continue
		}
		spec := p.spec(nil)
		b.adapt(spec)
		spec.Hold = true
		spec.ProcFS = &spawn.ProcFS{Flags: m.GetFlags(), Data: m.GetData()}
		child, err := spawn.Start(spec)
		if err != nil {
			var e *spawn.Error
			if errors.As(err, &e) && e.Step == spawn.StepProcFS {
				return b.procError(i, m, e.Errno)
			}
			return processError(err, p.process)
		}
		b.l.child = child
		if b.procfs, err = child.ProcFS(); err != nil {
			return err
		}
		b.open.add(b.procfs)
		return nil
	}
	return nil
}

// procError finds out what the kernel has against the options of a proc mount
// by trying them where its log can be read.
func (b *builder) procError(i int, m *agentv1.Mount, errno unix.Errno) error {
	var err error = errno
	if fs, terr := newFS("proc", "proc", m.GetFlags(), m.GetData()); terr != nil {
		err = terr
	} else {
		_ = fs.Close()
	}
	return fmt.Errorf("mounts[%d]: mount %q at %q: %w", i, m.GetType(), m.GetDestination(), err)
}

// namespaces gives the thread those of the container.
func (b *builder) namespaces() error {
	// A key ring of its own, as runc gives; a kernel may have none.
	if _, err := unix.KeyctlJoinSessionKeyring("_ses." + b.in.req.GetContainerId()); err != nil && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("create session keyring: %w", err)
	}
	joins := make(map[agentv1.Namespace_Type]*os.File)
	for typ, f := range b.in.joins {
		joins[typ] = f
	}
	delete(joins, agentv1.Namespace_TYPE_MOUNT)
	if err := joinNamespaces(joins); err != nil {
		return err
	}
	if err := unix.Unshare(b.plan.unshare); err != nil {
		return fmt.Errorf("make namespaces (%s): %w", flagNames(b.plan.unshare), err)
	}
	unix.Umask(0)
	// Nothing of the container's mounts reaches the guest's namespace, nor
	// keeps what is unmounted there.
	err := unix.MountSetattr(unix.AT_FDCWD, "/", unix.AT_RECURSIVE, &unix.MountAttr{Propagation: unix.MS_PRIVATE})
	if err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if b.plan.newNet {
		if err := loopbackUp(); err != nil {
			return fmt.Errorf("set up loopback interface: %w", err)
		}
	}
	if err := setPersonality(b.in.req.GetPersonality()); err != nil {
		return err
	}
	return b.timeOffsets()
}

// setPersonality is inherited by what the thread starts.
func setPersonality(p uint32) error {
	if p == 0 {
		return nil
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_PERSONALITY, uintptr(p), 0, 0); errno != 0 {
		return fmt.Errorf("personality: set %#x: %w", p, errno)
	}
	return nil
}

// timeOffsets sets the clocks of a new time namespace, which nobody is in yet.
func (b *builder) timeOffsets() error {
	offsets := b.in.req.GetTimeOffsets()
	if len(offsets) == 0 {
		return nil
	}
	var s strings.Builder
	for clock, o := range offsets {
		fmt.Fprintf(&s, "%s %d %d\n", clock, o.GetSeconds(), o.GetNanoseconds())
	}
	if err := writeAt(b.in.proc, fmt.Sprintf("%d/timens_offsets", unix.Gettid()), s.String()); err != nil {
		return fmt.Errorf("time_offsets: %w", err)
	}
	return nil
}

// identity sets names and sysctls of the namespaces.
func (b *builder) identity() error {
	req := b.in.req
	if h := req.GetHostname(); h != "" {
		if err := unix.Sethostname([]byte(h)); err != nil {
			return fmt.Errorf("hostname: set %q: %w", h, err)
		}
	}
	if d := req.GetDomainname(); d != "" {
		if err := unix.Setdomainname([]byte(d)); err != nil {
			return fmt.Errorf("domainname: set %q: %w", d, err)
		}
	}
	names := make([]string, 0, len(req.GetSysctl()))
	for name := range req.GetSysctl() {
		names = append(names, name)
	}
	sort.Strings(names)
	for _, name := range names {
		// The kernel takes the namespace of who opens the file, not of whose
		// /proc it is.
		if err := writeAt(b.in.proc, "sys/"+sysctlPath(name), req.GetSysctl()[name]); err != nil {
			return fmt.Errorf("sysctl[%q]: write %q: %w", name, req.GetSysctl()[name], err)
		}
	}
	return nil
}

// attachRoot puts the container's root file system over the thread's root.
// Paths of the thread are not affected: a lookup of "/" starts below what is
// mounted over it. So the guest's own files stay reachable until pivot.
func (b *builder) attachRoot() error {
	fd, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open root: %w", err)
	}
	b.oldRoot = os.NewFile(uintptr(fd), "/")
	b.open.add(b.oldRoot)
	if err := attach(b.in.rootfs, b.oldRoot); err != nil {
		return fmt.Errorf("rootfs: mount: %w", err)
	}
	b.root = rootDir{b.in.rootfs}
	return nil
}

func mountName(m *agentv1.Mount) string {
	switch {
	case m.GetSource() != "" && isBind(m):
		return m.GetSource()
	case isBind(m):
		return m.GetSharePath()
	default:
		return m.GetType()
	}
}

// mount performs one entry of the request's mounts.
func (b *builder) mount(i int, m *agentv1.Mount) error {
	tree := b.in.mounts[i]
	if b.in.source != nil {
		var err error
		if tree, err = b.elsewhere(m); err != nil {
			return err
		}
	}
	if tree != nil { // a bind mount or the cgroup
		dir, err := isDir(tree)
		if err != nil {
			return err
		}
		target, err := b.mountPoint(m.GetDestination(), dir, true)
		if err != nil {
			return err
		}
		defer func() { _ = target.Close() }()
		return b.place(m, tree, target, m.GetAttrSet())
	}

	special := m.GetType() == "proc" || m.GetType() == "sysfs"
	target, err := b.mountPoint(m.GetDestination(), true, !special)
	if err != nil {
		return err
	}
	defer func() { _ = target.Close() }()
	flags, data, set := m.GetFlags(), m.GetData(), m.GetAttrSet()
	if m.GetType() == "tmpfs" {
		var ro bool
		if flags, ro = without(flags, "ro"); ro {
			set |= unix.MOUNT_ATTR_RDONLY
		}
		if data, err = tmpfsMode(data, target); err != nil {
			return err
		}
	}
	fs, err := b.newMount(m, flags, data)
	if err != nil && errors.Is(err, unix.EPERM) && b.borrows(m.GetType()) {
		fs, err = openTreeAt(unix.AT_FDCWD, map[string]string{"proc": "/proc", "sysfs": "/sys"}[m.GetType()], true)
	}
	if err != nil {
		return err
	}
	b.open.add(fs)
	if m.GetCopyUp() {
		if err := b.copyUp(m.GetDestination(), fs); err != nil {
			return fmt.Errorf("copy what the root file system has there: %w", err)
		}
	}
	if m.GetType() == "tmpfs" && set&unix.MOUNT_ATTR_RDONLY != 0 {
		// Later mounts and devices may have to make files in it.
		set &^= unix.MOUNT_ATTR_RDONLY
		b.later = append(b.later, func() error {
			if err := setAttr(fs, unix.MOUNT_ATTR_RDONLY, 0, false); err != nil {
				return fmt.Errorf("mounts[%d]: mount %q at %q: %w", i, m.GetType(), m.GetDestination(), err)
			}
			return nil
		})
	}
	return b.place(m, fs, target, set)
}

func sourceOf(m *agentv1.Mount) string {
	if m.GetSource() != "" {
		return m.GetSource()
	}
	return m.GetType()
}

// newMount makes the file system of a mount, or takes what is made already.
func (b *builder) newMount(m *agentv1.Mount, flags, data []string) (*os.File, error) {
	if m.GetType() == "proc" && b.procfs != nil {
		if b.procMounted {
			// Another one of the same pid namespace shows the same.
			return openTree(b.procfs, false)
		}
		b.procMounted = true
		return b.procfs, nil
	}
	return newFS(m.GetType(), sourceOf(m), flags, data)
}

// borrows says whether a proc or sysfs shows a namespace that the container's
// user namespace does not own; its root then may only see the guest's mount.
func (b *builder) borrows(fstype string) bool {
	owner := map[string]int{"proc": unix.CLONE_NEWPID, "sysfs": unix.CLONE_NEWNET}[fstype]
	return b.in.inUser && owner != 0 && b.plan.unshare&owner == 0
}

// elsewhere opens the source of a mount in the agent's mount namespace, where
// it still is a peer of what other containers mount.
func (b *builder) elsewhere(m *agentv1.Mount) (tree *os.File, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		tree, err = b.in.source(m)
	}()
	<-done
	if tree != nil {
		b.open.add(tree)
	}
	return tree, err
}

// place gives a detached mount its attributes and puts it over target.
func (b *builder) place(m *agentv1.Mount, tree, target *os.File, set uint64) error {
	if err := setAttr(tree, m.GetRecAttrSet(), m.GetRecAttrClear(), true); err != nil {
		return err
	}
	if err := setAttr(tree, set, m.GetAttrClear(), false); err != nil {
		return err
	}
	if err := attach(tree, target); err != nil {
		return err
	}
	for _, p := range m.GetPropagation() {
		if err := setPropagation(tree, p); err != nil {
			return err
		}
	}
	if len(m.GetPropagation()) == 0 {
		b.plain = append(b.plain, tree)
	}
	return nil
}

// mountPoint opens the place of a mount, making it if it is missing.
func (b *builder) mountPoint(dest string, dir, follow bool) (*os.File, error) {
	flags := unix.O_PATH
	if !follow {
		flags |= unix.O_NOFOLLOW
	}
	f, err := b.root.open(dest, flags)
	if errors.Is(err, unix.ENOENT) {
		if dir {
			f, err = b.root.mkdirAll(dest)
		} else {
			f, err = b.root.createFile(dest, 0o755)
		}
		if err != nil {
			return nil, fmt.Errorf("make mount point: %w", err)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("open mount point: %w", err)
	}
	if err := b.checkMountPoint(f, !follow); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

func (b *builder) checkMountPoint(f *os.File, ordinary bool) error {
	same, err := sameMount(f, b.root.dir)
	if err != nil {
		return err
	}
	if same {
		return errors.New("the mount point is the root of the container")
	}
	if dir, err := isDir(f); ordinary && (err != nil || !dir) {
		return errors.New("must be mounted on ordinary directory")
	}
	return nil
}

// tmpfsMode keeps the permissions of the directory that a tmpfs is mounted
// over, unless an option sets them.
func tmpfsMode(data []string, target *os.File) ([]string, error) {
	for _, d := range data {
		if strings.HasPrefix(d, "mode=") {
			return data, nil
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(target.Fd()), &st); err != nil {
		return nil, err
	}
	return append([]string{fmt.Sprintf("mode=%04o", st.Mode&0o7777)}, data...), nil
}

func without(list []string, s string) ([]string, bool) {
	var out []string
	for _, e := range list {
		if e != s {
			out = append(out, e)
		}
	}
	return out, len(out) != len(list)
}

// resolvConf mounts the guest's resolv.conf unless the request mounts one.
func (b *builder) resolvConf() error {
	const dest = "/etc/resolv.conf"
	if b.in.resolv == nil {
		return nil
	}
	for _, m := range b.in.req.GetMounts() {
		if d := path.Clean(m.GetDestination()); d == dest || d == "/etc" {
			return nil
		}
	}
	target, err := b.mountPoint(dest, false, true)
	if err != nil {
		if errors.Is(err, unix.EROFS) {
			return nil // an image without one that nobody can put it into
		}
		return err
	}
	defer func() { _ = target.Close() }()
	return attach(b.in.resolv, target)
}

// workDir makes the process's working directory, as runc does.
func (b *builder) workDir() error {
	cwd := b.in.req.GetProcess().GetCwd()
	if cwd == "" {
		return nil
	}
	f, err := b.root.mkdirAll(path.Clean("/" + cwd))
	if err != nil {
		if errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ENOENT) {
			return nil // chdir says what is wrong
		}
		return fmt.Errorf("process.cwd: make %q: %w", cwd, err)
	}
	return f.Close()
}

// readonlyPath makes what is at p read-only. A missing path is fine.
func (b *builder) readonlyPath(p string) error {
	f, err := b.root.open(p, unix.O_PATH)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	tree, err := openTree(f, true)
	if err != nil {
		return err
	}
	b.open.add(tree)
	if err := setAttr(tree, unix.MOUNT_ATTR_RDONLY, 0, false); err != nil {
		return err
	}
	return attach(tree, f)
}

// maskPath hides what is at p: a file behind /dev/null, a directory behind an
// empty one. A missing path is fine.
func (b *builder) maskPath(p string) error {
	f, err := b.root.open(p, unix.O_PATH)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	dir, err := isDir(f)
	if err != nil {
		return err
	}
	var mask *os.File
	if dir {
		mask, err = newFS("tmpfs", "tmpfs", []string{"ro"}, []string{"nr_blocks=1", "nr_inodes=1"})
		if err == nil {
			b.open.add(mask)
			err = setAttr(mask, unix.MOUNT_ATTR_RDONLY, 0, false)
		}
	} else {
		mask, err = openTreeAt(unix.AT_FDCWD, "/dev/null", false)
		if err == nil {
			b.open.add(mask)
		}
	}
	if err != nil {
		return err
	}
	return attach(mask, f)
}

// pivot makes the container's root the thread's, and init's if that exists, and
// drops the guest's mounts from the namespace.
func (b *builder) pivot() error {
	if err := unix.Fchdir(int(b.root.dir.Fd())); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	// The old root is mounted over the new one now.
	if err := unix.Fchdir(int(b.oldRoot.Fd())); err != nil {
		return err
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the guest's root: %w", err)
	}
	return unix.Chdir("/")
}

// rootPropagation applies Rootfs.propagation. It comes last: a shared root
// cannot be pivoted to.
func (b *builder) rootPropagation() error {
	p := b.in.req.GetRootfs().GetPropagation()
	if p == 0 || p&^msRec == unix.MS_PRIVATE {
		return nil
	}
	if err := setPropagation(b.root.dir, p&^msRec); err != nil {
		return err
	}
	if p&msRec == 0 {
		return nil
	}
	for _, m := range b.plain {
		if err := setPropagation(m, p&^msRec); err != nil {
			return err
		}
	}
	return nil
}

// writeAt writes to a file that exists below dir, in one write.
func writeAt(dir *os.File, p, s string) error {
	f, err := openAt(dir, p, unix.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = unix.Write(int(f.Fd()), []byte(s))
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// loopbackUp sets the flag of the loopback interface of the thread's network
// namespace.
func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(s) }()
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(s, unix.SIOCGIFFLAGS, ifr); err != nil {
		return err
	}
	ifr.SetUint16(ifr.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr)
}
