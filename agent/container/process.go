package container

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strconv"
	"strings"

	"github.com/moby/sys/user"
	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/agent/spawn"
	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

// maxPasswd bounds what is read of a container's /etc/passwd.
const maxPasswd = 4 << 20

// defaultUmask is the file mode creation mask without one in the request, as
// runc's.
const defaultUmask = 0o022

// /dev/ptmx is character device 5:2, the terminals that it gives are 136:N.
const (
	ptmxMinor     = 2
	ptySlaveMajor = 136
)

// idMaps translate ids of a container to those of the calling thread's user
// namespace. The zero value leaves them as they are.
type idMaps struct{ uids, gids []*agentv1.IDMapping }

func (m idMaps) uid(id uint32) uint32 { return mapID(m.uids, id) }
func (m idMaps) gid(id uint32) uint32 { return mapID(m.gids, id) }

// overflowID stands for ids that have no mapping.
const overflowID = 65534

func mapID(list []*agentv1.IDMapping, id uint32) uint32 {
	if len(list) == 0 {
		return id
	}
	for _, m := range list {
		if id >= m.GetContainerId() && id-m.GetContainerId() < m.GetSize() {
			return m.GetHostId() + (id - m.GetContainerId())
		}
	}
	return overflowID
}

// preparation turns a process of a request into what is spawned. It is used on
// a thread that is in the container's namespaces.
type preparation struct {
	root    rootDir
	process *agentv1.Process
	stdio   Stdio
	seccomp *agentv1.Seccomp
	proc    *os.File
	ids     idMaps
	// unlimited leaves resource limits and priorities to who adopts the process.
	unlimited bool

	master, slave *os.File
	null          *os.File
}

func (p *preparation) close() {
	for _, f := range []*os.File{p.master, p.slave, p.null} {
		if f != nil {
			_ = f.Close()
		}
	}
}

// takeConsole hands the terminal's master over to the caller.
func (p *preparation) takeConsole() *os.File {
	m := p.master
	p.master = nil
	return m
}

// program is what is executed, looked up in the container.
func (p *preparation) program() (*spawn.Program, error) {
	prog := &spawn.Program{Args: p.process.GetArgs(), Dir: p.process.GetCwd()}
	if prog.Dir == "" {
		prog.Dir = "/"
	}
	if err := p.checkDir(prog.Dir); err != nil {
		return nil, err
	}
	var err error
	if prog.Env, err = p.environment(); err != nil {
		return nil, err
	}
	if prog.Path, err = lookPath(p.root, prog.Dir, prog.Args[0], getenv(prog.Env, "PATH")); err != nil {
		return nil, err
	}
	prog.Files, err = p.files()
	return prog, err
}

// spec is the process with its program; nil: that comes later.
func (p *preparation) spec(prog *spawn.Program) *spawn.Spec {
	s := &spawn.Spec{
		Setsid:     true,
		NoNewPrivs: p.process.GetNoNewPrivileges(),
		Proc:       p.proc,
		Credential: &spawn.Credential{
			UID:    p.process.GetUser().GetUid(),
			GID:    p.process.GetUser().GetGid(),
			Groups: p.process.GetUser().GetAdditionalGids(),
		},
	}
	umask := uint32(defaultUmask)
	if u := p.process.GetUser(); u != nil && u.Umask != nil {
		umask = u.GetUmask()
	}
	s.Umask = &umask
	s.Ctty = p.process.GetTerminal()
	if prog != nil {
		s.Path, s.Args, s.Env, s.Dir, s.Files = prog.Path, prog.Args, prog.Env, prog.Dir, prog.Files
	}
	if !p.unlimited {
		setLimits(s, p.process)
	}
	// No capabilities in the request means none, not those of the agent.
	c := p.process.GetCapabilities()
	s.Capabilities = &spawn.Capabilities{
		Bounding: c.GetBounding(), Effective: c.GetEffective(), Inheritable: c.GetInheritable(),
		Permitted: c.GetPermitted(), Ambient: c.GetAmbient(),
	}
	if p.seccomp != nil && !p.process.GetNoSeccomp() {
		s.Seccomp = &spawn.Seccomp{Filter: p.seccomp.GetFilter(), Flags: p.seccomp.GetFlags()}
	}
	return s
}

// checkDir says whether the working directory can be entered. The child enters
// it by its path, when it has no descriptor left that a path could lead to.
func (p *preparation) checkDir(cwd string) error {
	f, err := p.root.open(cwd, unix.O_PATH|unix.O_DIRECTORY)
	if errors.Is(err, unix.EACCES) {
		// The user may be allowed what root is not, on a network file system.
		return nil
	}
	if err != nil {
		return fmt.Errorf("chdir to cwd (%q) set in config.json failed: %w", cwd, err)
	}
	return f.Close()
}

// environment returns the variables, each once: the last one wins. HOME comes
// from the container's /etc/passwd if it is not set.
func (p *preparation) environment() ([]string, error) {
	var env []string
	at := make(map[string]int)
	for _, e := range p.process.GetEnv() {
		key, _, _ := strings.Cut(e, "=")
		if i, ok := at[key]; ok {
			env[i] = e
			continue
		}
		at[key] = len(env)
		env = append(env, e)
	}
	if i, ok := at["HOME"]; ok && env[i] != "HOME=" {
		return env, nil
	} else if ok {
		env = append(env[:i], env[i+1:]...)
	}
	home, err := p.home()
	if err != nil {
		return nil, err
	}
	return append(env, "HOME="+home), nil
}

func (p *preparation) home() (string, error) {
	f, err := p.root.open("/etc/passwd", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return "/", nil //nolint:nilerr // an image without users
	}
	defer func() { _ = f.Close() }()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return "/", nil //nolint:nilerr // nor is this a list of them
	}
	uid := int(p.process.GetUser().GetUid())
	users, err := user.ParsePasswdFilter(io.LimitReader(f, maxPasswd), func(u user.User) bool { return u.Uid == uid })
	if err != nil {
		return "", fmt.Errorf("read /etc/passwd of the container: %w", err)
	}
	if len(users) == 0 || users[0].Home == "" {
		return "/", nil
	}
	return users[0].Home, nil
}

func getenv(env []string, key string) string {
	for _, e := range env {
		if k, v, _ := strings.Cut(e, "="); k == key {
			return v
		}
	}
	return ""
}

// files are the standard streams.
func (p *preparation) files() ([3]*os.File, error) {
	if p.process.GetTerminal() {
		return [3]*os.File{p.slave, p.slave, p.slave}, nil
	}
	files := [3]*os.File{p.stdio.In, p.stdio.Out, p.stdio.Err}
	for i, f := range files {
		if f != nil {
			continue
		}
		if p.null == nil {
			var err error
			if p.null, err = p.openNull(); err != nil {
				return files, err
			}
		}
		files[i] = p.null
	}
	return files, nil
}

// openNull opens the container's null device.
func (p *preparation) openNull() (*os.File, error) {
	null, err := p.root.open("/dev/null", unix.O_RDWR|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return nil, fmt.Errorf("open /dev/null of the container: %w", err)
	}
	if ok, err := isDevice(null, defaultDevices[0]); err != nil || !ok {
		_ = null.Close()
		return nil, errors.Join(errors.New("/dev/null of the container is not the null device"), err)
	}
	return null, nil
}

// openTerminal allocates a pseudo-terminal in the container's own devpts.
func (p *preparation) openTerminal() (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("process.terminal: %w", err)
		}
	}()
	dir, err := p.root.open("/dev/pts", unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return fmt.Errorf("open /dev/pts: %w", err)
	}
	defer func() { _ = dir.Close() }()
	// Only devpts itself is asked for a terminal. Its names are the kernel's.
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &st); err != nil {
		return err
	}
	if st.Type != unix.DEVPTS_SUPER_MAGIC {
		return errors.New("/dev/pts of the container is not a devpts file system")
	}
	fd, err := unix.Openat2(int(dir.Fd()), "ptmx", &unix.OpenHow{
		Flags:   unix.O_RDWR | unix.O_NOCTTY | unix.O_CLOEXEC | unix.O_NONBLOCK,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return fmt.Errorf("open /dev/pts/ptmx: %w", err)
	}
	p.master = os.NewFile(uintptr(fd), "ptmx")
	var dev unix.Stat_t
	if err := unix.Fstat(fd, &dev); err != nil {
		return err
	}
	if dev.Mode&unix.S_IFMT != unix.S_IFCHR || dev.Rdev != unix.Mkdev(5, ptmxMinor) {
		return errors.New("/dev/pts/ptmx of the container is not a terminal multiplexer")
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		return fmt.Errorf("unlock: %w", err)
	}
	slave, err := ptyPeer(fd)
	if err != nil {
		return fmt.Errorf("open slave: %w", err)
	}
	p.slave = os.NewFile(uintptr(slave), "tty")
	if h, w := p.process.GetConsoleHeight(), p.process.GetConsoleWidth(); h != 0 || w != 0 {
		ws := &unix.Winsize{Row: uint16(h), Col: uint16(w)}
		if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, ws); err != nil {
			return fmt.Errorf("set size: %w", err)
		}
	}
	if err := unix.Fchown(slave, int(p.ids.uid(p.process.GetUser().GetUid())), -1); err != nil {
		return fmt.Errorf("set owner: %w", err)
	}
	return nil
}

// ptyPeer opens the other side without a path.
func ptyPeer(master int) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(master), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// setLimits copies what the spawner applies from outside.
func setLimits(s *spawn.Spec, p *agentv1.Process) {
	for _, r := range p.GetRlimits() {
		s.Rlimits = append(s.Rlimits, spawn.Rlimit{Resource: int(r.GetResource()), Soft: r.GetSoft(), Hard: r.GetHard()})
	}
	if p.OomScoreAdj != nil {
		adj := int(p.GetOomScoreAdj())
		s.OOMScoreAdj = &adj
	}
	if a := p.GetScheduler(); a != nil {
		s.Scheduler = &spawn.Scheduler{
			Policy: a.GetPolicy(), Flags: a.GetFlags(), Nice: a.GetNice(), Priority: a.GetPriority(),
			Runtime: a.GetRuntime(), Deadline: a.GetDeadline(), Period: a.GetPeriod(),
		}
	}
	if a := p.GetIoPriority(); a != nil {
		s.IOPriority = &spawn.IOPriority{Class: a.GetClass(), Priority: a.GetPriority()}
	}
}

// chownStdio gives the streams to the process's user, as runc does, so that it
// can open /dev/stdout again. ids are those of the calling thread.
func chownStdio(s Stdio, p *agentv1.Process, ids idMaps) error {
	uid := int(ids.uid(p.GetUser().GetUid()))
	for name, f := range map[string]*os.File{"stdin": s.In, "stdout": s.Out, "stderr": s.Err} {
		if f == nil {
			continue
		}
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if int(st.Uid) == uid || st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == unix.Mkdev(1, 3) {
			continue
		}
		if err := unix.Fchown(int(f.Fd()), uid, -1); err != nil && !errors.Is(err, unix.EROFS) && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("%s: set owner: %w", name, err)
		}
	}
	return nil
}

// execError is a program that cannot be executed, in the words of Go's os/exec,
// which runc's clients match on.
type execError struct {
	name string
	err  error
}

func (e *execError) Error() string { return "exec: " + strconv.Quote(e.name) + ": " + e.err.Error() }
func (e *execError) Unwrap() error { return e.err }

// errNotFound is a program that is in no directory of PATH.
var errNotFound = errors.New("executable file not found in $PATH")

// lookPath finds the program, in the container's root. The kernel resolves it
// again when it is executed; what counts here is the message, and that it is no
// magic link, which would lead to the agent's own program.
func lookPath(root rootDir, cwd, name, pathEnv string) (string, error) {
	if strings.Contains(name, "/") {
		full := name
		if !path.IsAbs(name) {
			full = "/" + cwd + "/" + name
		}
		if err := executable(root, full); err != nil {
			if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
				err = &os.PathError{Op: "stat", Path: name, Err: err}
			}
			return "", &execError{name, err}
		}
		return name, nil
	}
	for _, dir := range strings.Split(pathEnv, ":") {
		if pathEnv == "" {
			break
		}
		if !path.IsAbs(dir) {
			// os/exec finds these, and refuses to run them.
			if executable(root, path.Join("/"+cwd, dir, name)) == nil {
				return "", &execError{name, errors.New("cannot run executable found relative to current directory")}
			}
			continue
		}
		if p := path.Join(dir, name); executable(root, p) == nil {
			return p, nil
		}
	}
	return "", &execError{name, errNotFound}
}

func executable(root rootDir, p string) error {
	f, err := root.open(p, unix.O_PATH)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return unix.EISDIR
	}
	if st.Mode&0o111 == 0 {
		return unix.EACCES
	}
	return nil
}

// processError says what went wrong with a process in terms of the request.
func processError(err error, p *agentv1.Process) error {
	var e *spawn.Error
	if err == nil || !errors.As(err, &e) {
		return err
	}
	switch e.Step {
	case spawn.StepExec:
		name := p.GetArgs()[0]
		if errors.Is(e.Errno, unix.EACCES) {
			return &execError{name, e.Errno}
		}
		return &os.PathError{Op: "exec", Path: name, Err: e.Errno}
	case spawn.StepChdir:
		return fmt.Errorf("chdir to cwd (%q) set in config.json failed: %w", p.GetCwd(), e.Errno)
	default:
		field, ok := stepFields[e.Step]
		if !ok {
			return err
		}
		return fmt.Errorf("%s: %w", field, err)
	}
}

var stepFields = map[spawn.Step]string{
	spawn.StepRlimit:      "process.rlimits",
	spawn.StepOOMScoreAdj: "process.oomScoreAdj",
	spawn.StepScheduler:   "process.scheduler",
	spawn.StepIOPriority:  "process.ioPriority",
	spawn.StepGroups:      "process.user.additionalGids",
	spawn.StepGID:         "process.user.gid",
	spawn.StepUID:         "process.user.uid",
	spawn.StepBounding:    "process.capabilities.bounding",
	spawn.StepCapset:      "process.capabilities",
	spawn.StepAmbient:     "process.capabilities.ambient",
	spawn.StepNoNewPrivs:  "process.noNewPrivileges",
	spawn.StepSeccomp:     "linux.seccomp",
	spawn.StepIDMap:       "linux.uidMappings",
	spawn.StepUnshare:     "linux.namespaces",
}
