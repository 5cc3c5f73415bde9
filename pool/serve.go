package pool

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/golang/glog"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/state"
)

const (
	// endTime is how long a standby may take to end by itself.
	endTime = 5 * time.Second
	// startTime is how long one may take to become ready, beside the time limit
	// of its VM's boot.
	startTime = 2 * time.Minute
	// settledAfter is how long one must have been ready for its end to be no
	// reason to wait with the next.
	settledAfter = 5 * time.Second
	// renewEvery is how often it is looked whether what standbys were made of is
	// still there. A claim looks, too.
	renewEvery = 5 * time.Second
	// maxStandbys bounds all entries together.
	maxStandbys = 1024
	// maxConns bounds the connections that are served at a time.
	maxConns = 256
)

// backoff after a standby that did not become ready.
const (
	firstBackoff = time.Second
	lastBackoff  = time.Minute
)

// ErrRuns is wrapped by Serve if a factory runs in the directory already.
var ErrRuns = errors.New("a factory runs already")

// Entry is one kind of VM that the factory keeps ready.
type Entry struct {
	// VM is what a standby is to start; Size of them are kept.
	VM   *supervisorv1.VM
	Size int
	// Files are those that a VM is made of: if one is replaced, the standbys
	// are. The hypervisor's program is one without being listed.
	Files []string
}

// Process is a standby that was started.
type Process interface {
	Pid() int
	Kill()
	// Wait returns when the process has ended, and how; it is called once.
	Wait() error
}

// Options of Serve.
type Options struct {
	// Dir is the factory's directory, made by Serve if need be.
	Dir     string
	Version string
	// Debug makes standbys write debug messages to their log.
	Debug   bool
	Entries []Entry
	// Start starts a standby. It owns neither file. Its stderr is log.
	Start func(dir string, control, log *os.File) (Process, error)
	// Ready, if not nil, is called when claims are served.
	Ready func()

	// calm, if not zero, has other times than quietTime and patience.
	calm calm
}

// factory is the daemon.
type factory struct {
	o      Options
	dir    *os.File // locked as long as the factory lives
	begun  time.Time
	spaces []string
	kick   chan struct{} // one token: there may be something to refill
	claims chan struct{} // one token: somebody has claimed something
	stop   context.CancelFunc
	wg     sync.WaitGroup

	mu        sync.Mutex // guards the fields below, and those of entries and standbys
	entries   []*entry
	next      int // number of the next standby's directory
	calm      calm
	unfit     uint64
	lastUnfit string
	ended     bool
	farewell  []*net.UnixConn // of those who wait for the end
}

type entry struct {
	Entry
	standbys []*standby // in the order of their start

	claimed, misses, refills, failures uint64
	lastRefill, totalRefill            time.Duration
	lastFailure                        string
	backoff                            time.Duration
	notBefore                          time.Time
}

// phase is the state of a standby, as the factory knows it:
//
//	starting ──READY──▶ ready ──claim──▶ offered ──CLAIMED──▶ (forgotten)
//	                      ▲                │
//	                      └─────READY──────┘
//
// Each of them ends with the process, or is retired: told to end.
type phase int

const (
	starting phase = iota
	ready
	offered
	retired
)

// standby is a process of the factory that is nobody's supervisor yet.
type standby struct {
	entry *entry
	dir   string
	proc  Process
	conn  *net.UnixConn
	ref   state.ProcessRef

	// Guarded by factory.mu.
	phase   phase
	stamp   string
	files   []string
	failure string
	begun   time.Time // of its start, then of its being ready
	alone   bool      // nobody waits for its end or ends it any more

	settled chan struct{} // closed when it is ready for the first time, or has ended
	once    sync.Once
	done    chan struct{} // closed when it has ended or is a pod's
}

func (s *standby) settle() { s.once.Do(func() { close(s.settled) }) }

// Serve is the factory: it keeps standbys and hands them out until ctx ends or
// somebody asks it to stop. Standbys end with it, claimed ones do not.
func Serve(ctx context.Context, o Options) (err error) {
	if err := checkOptions(&o); err != nil {
		return err
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return fmt.Errorf("make the factory's directory: %w", err)
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	f := &factory{o: o, begun: time.Now(), spaces: namespaces(), kick: make(chan struct{}, 1), claims: make(chan struct{}, 1), calm: o.calm, stop: stop, next: 1}
	if f.calm == (calm{}) {
		f.calm = calm{quiet: quietTime, patience: patience}
	}
	for _, e := range o.Entries {
		f.entries = append(f.entries, &entry{Entry: e})
	}
	// The smallest that serves a claim is taken.
	slices.SortStableFunc(f.entries, func(a, b *entry) int {
		return cmp.Or(cmp.Compare(a.VM.MemoryMib, b.VM.MemoryMib), cmp.Compare(a.VM.Vcpus, b.VM.Vcpus))
	})
	if f.dir, err = lockDir(o.Dir); err != nil {
		return err
	}
	defer func() {
		_ = f.dir.Close()
		for _, c := range f.farewell {
			_ = c.Close()
		}
	}()
	f.sweep()
	l, err := f.listen()
	if err != nil {
		return err
	}
	defer func() {
		_ = l.Close()
		_ = unix.Unlinkat(int(f.dir.Fd()), SocketFile, 0)
		f.wg.Wait()
	}()
	f.wg.Go(func() {
		<-ctx.Done()
		_ = l.Close()
	})
	f.wg.Go(func() { f.keep(ctx) })
	if o.Ready != nil {
		o.Ready()
	}
	err = f.accept(ctx, l)
	stop()
	f.end()
	return err
}

func checkOptions(o *Options) error {
	sum := 0
	for i, e := range o.Entries {
		if e.VM == nil || e.Size < 0 {
			return fmt.Errorf("factory: entry %d has no VM or a negative size", i+1)
		}
		sum += e.Size
	}
	switch {
	case !filepath.IsAbs(o.Dir):
		return fmt.Errorf("factory: the directory is %q, want an absolute path", o.Dir)
	case sum == 0:
		return errors.New("factory: no entry of the policy has a cache, so there is nothing to keep")
	case sum > maxStandbys:
		return fmt.Errorf("factory: %d VMs are to be kept, at most %d can", sum, maxStandbys)
	case o.Start == nil:
		return errors.New("factory: nobody starts standbys")
	}
	return nil
}

// lockDir opens and locks the factory's directory, for its only owner.
func lockDir(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	dir := os.NewFile(uintptr(fd), path)
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && (int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0) {
		err = fmt.Errorf("%s is not a directory that only this user can write to", path)
	}
	if err == nil {
		if err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("%w in %s", ErrRuns, path)
		}
	}
	if err != nil {
		_ = dir.Close()
		return nil, err
	}
	return dir, nil
}

// sweep removes what standbys of an earlier factory left. One that still lives
// has its directory locked: it is about to end, or is a pod's and does it itself.
func (f *factory) sweep() {
	entries, err := os.ReadDir(f.o.Dir)
	if err != nil {
		glog.Errorf("factory: %v", err)
		return
	}
	for _, e := range entries {
		n, err := strconv.Atoi(e.Name())
		if err != nil || n < 1 || !e.IsDir() {
			continue
		}
		removeDir(filepath.Join(f.o.Dir, e.Name()))
	}
}

// LockDir locks a standby's directory for the standby's life.
func LockDir(dir string) (*os.File, error) { return lockDir(dir) }

// removeDir removes the directory of a standby that has ended. What is mounted
// there in the standby's namespace would go with the directory, so a standby that
// lives must not be met.
func removeDir(dir string) {
	d, err := lockDir(dir)
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			glog.V(1).Infof("factory: %v", err)
		}
		return
	}
	defer d.Close()
	if err := RemoveDir(dir); err != nil {
		glog.Errorf("factory: %v", err)
	}
}

// RemoveDir removes a standby's directory with the files that a standby makes.
func RemoveDir(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		// Files and an empty mount point; there is nothing deeper.
		err = errors.Join(err, os.Remove(filepath.Join(dir, e.Name())))
	}
	return errors.Join(err, os.Remove(dir))
}

// listen makes the socket, in place of one that was there: the directory is ours.
func (f *factory) listen() (*net.UnixListener, error) {
	const fresh = "." + SocketFile
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	file := os.NewFile(uintptr(fd), SocketFile)
	defer file.Close()
	_ = unix.Unlinkat(int(f.dir.Fd()), fresh, 0)
	// The permissions of a socket are those of its descriptor when it is bound.
	err = unix.Fchmod(fd, 0o600)
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrUnix{Name: address(f.dir, fresh)})
	}
	if err == nil {
		err = unix.Listen(fd, maxConns)
	}
	if err == nil {
		err = unix.Renameat(int(f.dir.Fd()), fresh, int(f.dir.Fd()), SocketFile)
	}
	if err != nil {
		_ = unix.Unlinkat(int(f.dir.Fd()), fresh, 0)
		return nil, fmt.Errorf("make %s: %w", filepath.Join(f.o.Dir, SocketFile), err)
	}
	l, err := net.FileListener(file)
	if err != nil {
		return nil, err
	}
	ul, ok := l.(*net.UnixListener)
	if !ok {
		_ = l.Close()
		return nil, errors.New("the listener is no unix socket")
	}
	ul.SetUnlinkOnClose(false)
	return ul, nil
}

func (f *factory) accept(ctx context.Context, l *net.UnixListener) error {
	slots := make(chan struct{}, maxConns)
	var conns sync.WaitGroup
	defer conns.Wait()
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.ECONNABORTED) {
				// Whoever waits in the queue starts a supervisor itself.
				glog.Errorf("factory: %v", err)
				pause(ctx, 100*time.Millisecond)
				continue
			}
			return fmt.Errorf("factory: %w", err)
		}
		select {
		case slots <- struct{}{}:
			conns.Go(func() {
				defer func() { <-slots }()
				f.serve(ctx, conn)
			})
		default:
			_ = conn.Close()
		}
	}
}

// pause waits for a time or the end of ctx.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// serve answers one request.
func (f *factory) serve(ctx context.Context, conn *net.UnixConn) {
	mine := true
	defer func() {
		if mine {
			_ = conn.Close()
		}
	}()
	if err := sameUser(conn); err != nil {
		glog.Warningf("factory: connection refused: %v", err)
		return
	}
	_ = conn.SetDeadline(time.Now().Add(requestTime))
	stop := bound(ctx, conn)
	defer stop()
	var req supervisorv1.FactoryRequest
	fds, err := receive(conn, &req)
	if err != nil {
		return
	}
	defer fds.close()
	if err := checkRequest(&req, len(fds)); err != nil {
		_ = send(conn, &supervisorv1.ClaimAnswer{Refused: clip(err.Error())})
		return
	}
	switch a := req.Ask.(type) {
	case *supervisorv1.FactoryRequest_Claim:
		f.disturbed()
		if err := f.claim(a.Claim, &req, fds, conn); err != nil {
			glog.V(1).Infof("factory: no supervisor for %s: %v", a.Claim.SandboxId, err)
			_ = send(conn, &supervisorv1.ClaimAnswer{Refused: clip(err.Error())})
		}
	case *supervisorv1.FactoryRequest_Status:
		_ = send(conn, f.status())
	case *supervisorv1.FactoryRequest_Stop:
		// The connection ends when nothing is left.
		mine = false
		f.mu.Lock()
		f.farewell = append(f.farewell, conn)
		f.mu.Unlock()
		f.stop()
	}
}

// sameUser lets in only the factory's own user, whose the pod will be.
func sameUser(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); cerr != nil || err != nil {
		return errors.Join(cerr, err)
	}
	if int(cred.Uid) != os.Geteuid() {
		return fmt.Errorf("user %d is not %d", cred.Uid, os.Geteuid())
	}
	return nil
}

// claim hands a request on to a standby, which answers it.
func (f *factory) claim(c *supervisorv1.Claim, req proto.Message, fds descriptors, conn *net.UnixConn) error {
	if c.Version != f.o.Version {
		return fmt.Errorf("the factory is runv %s, the creator %s", f.o.Version, c.Version)
	}
	for i, n := range c.Namespaces {
		if n != f.spaces[i] || n == "" {
			return fmt.Errorf("the factory is in another %s namespace than the creator", namespaceKinds[i])
		}
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	for {
		s, err := f.pick(c.Vm)
		if err != nil {
			return err
		}
		all := append(slices.Clone(fds), 0)
		cerr := raw.Control(func(fd uintptr) {
			all[len(fds)] = int(fd)
			err = send(s.conn, req, all...)
		})
		if err = errors.Join(cerr, err); err == nil {
			return nil
		}
		// It cannot be talked to, so it has ended or is about to.
		glog.Warningf("factory: standby %d: %v", s.ref.Pid, err)
		f.retire(s)
	}
}

// pick takes a standby for a VM out of those that are ready.
func (f *factory) pick(vm *supervisorv1.VM) (*standby, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	var reason error
	var missed *entry
	for _, e := range f.entries {
		if e.Size == 0 {
			continue
		}
		if err := fits(e.VM, vm); err != nil {
			if reason == nil {
				reason = fmt.Errorf("no VM that it keeps fits: %w", err)
			}
			continue
		}
		if missed == nil {
			missed = e
		}
		for _, s := range e.standbys {
			if s.phase != ready {
				continue
			}
			if stamp(s.files) != s.stamp {
				f.retireLocked(s)
				continue
			}
			s.phase = offered
			return s, nil
		}
	}
	if missed == nil {
		f.unfit++
		f.lastUnfit = reason.Error()
		return nil, reason
	}
	missed.misses++
	return nil, errors.New("no VM is ready")
}

// retire tells a standby to end.
func (f *factory) retire(s *standby) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.retireLocked(s)
}

func (f *factory) retireLocked(s *standby) {
	if s.phase == retired {
		return
	}
	if s.phase != offered {
		s.phase = retired
	}
	// It still hears what is on its way, and may yet say that it was claimed.
	_ = s.conn.CloseWrite()
	if s.phase == retired {
		s.expire(2 * endTime)
	}
	f.wake()
}

// expire lets the factory give a standby up that has said nothing after a time.
func (s *standby) expire(after time.Duration) {
	_ = s.conn.SetReadDeadline(time.Now().Add(after))
}

// wake lets keep look for something to do.
func (f *factory) wake() {
	select {
	case f.kick <- struct{}{}:
	default:
	}
}

// keep fills the entries up, one standby at a time and not while containers are
// started, and renews what is out of date.
func (f *factory) keep(ctx context.Context) {
	tick := time.NewTicker(renewEvery)
	defer tick.Stop()
	for {
		e, later := f.lacking()
		if rest := f.still(); e != nil && rest > 0 {
			e, later = nil, rest
		}
		if e != nil && ctx.Err() == nil {
			if s := f.start(ctx, e); s != nil {
				f.attend(ctx, s)
			}
			continue
		}
		wait := time.NewTimer(later)
		select {
		case <-f.kick:
		case <-wait.C:
		case <-tick.C:
			f.renew()
		case <-ctx.Done():
			wait.Stop()
			return
		}
		wait.Stop()
	}
}

// lacking returns the entry that lacks the largest part of its standbys, or how
// long one has to wait for one that has failed.
func (f *factory) lacking() (*entry, time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now, later := time.Now(), time.Hour
	var most *entry
	mostPart := 0.0
	for _, e := range f.entries {
		have := 0
		for _, s := range e.standbys {
			if s.phase != retired {
				have++
			}
		}
		if have >= e.Size {
			continue
		}
		if d := e.notBefore.Sub(now); d > 0 {
			later = min(later, d)
			continue
		}
		if part := float64(e.Size-have) / float64(e.Size); part > mostPart {
			most, mostPart = e, part
		}
	}
	return most, later
}

// renew retires the standbys that were made of what is no more.
func (f *factory) renew() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, e := range f.entries {
		for _, s := range e.standbys {
			if s.phase == ready && stamp(s.files) != s.stamp {
				glog.Infof("factory: standby %d is renewed: what it was made of was replaced", s.ref.Pid)
				f.retireLocked(s)
			}
		}
	}
}

// failed notes that an entry got no standby.
func (f *factory) failed(e *entry, reason string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	e.failures++
	if e.lastFailure != reason {
		glog.Errorf("factory: a VM with %d vcpus and %d MiB was not made ready: %s", e.VM.Vcpus, e.VM.MemoryMib, reason)
	}
	e.lastFailure = reason
	e.backoff = min(max(2*e.backoff, firstBackoff), lastBackoff)
	e.notBefore = time.Now().Add(e.backoff)
}

// start starts a standby; nil if that fails or the factory ends.
func (f *factory) start(ctx context.Context, e *entry) *standby {
	s, err := f.spawn(e)
	if err != nil {
		f.failed(e, err.Error())
		return nil
	}
	f.mu.Lock()
	s.expire(startTime + time.Duration(e.VM.BootTimeoutMs)*time.Millisecond)
	e.standbys = append(e.standbys, s)
	if f.ended || ctx.Err() != nil {
		f.retireLocked(s)
	}
	f.mu.Unlock()
	f.wg.Go(func() { f.watch(s) })
	return s
}

func (f *factory) spawn(e *entry) (_ *standby, err error) {
	s := &standby{entry: e, begun: time.Now(), settled: make(chan struct{}), done: make(chan struct{}), files: slices.Clone(e.Files)}
	s.stamp = stamp(s.files)
	for ; ; f.next++ {
		s.dir = filepath.Join(f.o.Dir, strconv.Itoa(f.next))
		if err = os.Mkdir(s.dir, 0o700); !errors.Is(err, os.ErrExist) {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	f.next++
	defer func() {
		if err != nil {
			removeDir(s.dir)
		}
	}()
	log, err := os.OpenFile(filepath.Join(s.dir, LogFile), os.O_RDWR|os.O_CREATE|os.O_EXCL|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "control")
	defer theirs.Close()
	if s.conn, err = unixConn(os.NewFile(uintptr(fds[0]), "control")); err != nil {
		return nil, err
	}
	// It waits in the socket until the standby has started.
	if err = send(s.conn, &supervisorv1.StandbyOrder{Dir: s.dir, Vm: e.VM, Debug: f.o.Debug}); err == nil {
		s.proc, err = f.o.Start(s.dir, theirs, log)
	}
	if err != nil {
		_ = s.conn.Close()
		return nil, err
	}
	if s.ref, err = state.RefOf(s.proc.Pid()); err != nil {
		s.ref.Pid, err = s.proc.Pid(), nil // it has ended: watch finds out
	}
	return s, nil
}

// LogFile is what a standby prints, in its directory. A pod's supervisor goes on
// in the pod's log.
const LogFile = "supervisor.log"

// watch follows a standby to its end, or to the moment when it is a pod's.
func (f *factory) watch(s *standby) {
	exited := make(chan error, 1)
	// A claimed supervisor is a child as long as the factory lives, so this
	// goroutine outlives Serve.
	go func() { exited <- s.proc.Wait() }()
	claimed := f.listenTo(s)
	_ = s.conn.Close()
	if claimed {
		f.forget(s)
		return
	}
	f.mu.Lock()
	alone := s.alone
	f.mu.Unlock()
	if alone {
		f.lost(s, nil)
		return
	}
	// Its end of the connection is closed, or it does not answer.
	t := time.NewTimer(endTime)
	defer t.Stop()
	var err error
	select {
	case err = <-exited:
	case <-t.C:
		s.proc.Kill()
		err = <-exited
	}
	removeDir(s.dir)
	f.lost(s, err)
}

// listenTo handles the reports of a standby; it returns true if it was claimed,
// false when it has ended.
func (f *factory) listenTo(s *standby) bool {
	reset := false
	for {
		var r supervisorv1.StandbyReport
		fds, err := receive(s.conn, &r)
		if errors.Is(err, unix.ECONNRESET) && !reset {
			// It ended before it had read a yield. That is told once, and in front
			// of what it said last.
			reset = true
			continue
		}
		if err != nil {
			return false
		}
		fds.close()
		switch r.State {
		case supervisorv1.StandbyReport_READY:
			f.isReady(s, r.Vm)
		case supervisorv1.StandbyReport_FAILED:
			f.mu.Lock()
			s.failure = oneLine(r.Message)
			f.mu.Unlock()
		case supervisorv1.StandbyReport_CLAIMED:
			return true
		default:
		}
	}
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

func (f *factory) isReady(s *standby, vm *supervisorv1.StandIn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch s.phase {
	case starting:
		if p := program(int(vm.GetPid())); p != "" {
			s.files = append(s.files, p)
			s.stamp += stamp([]string{p})
		}
		e := s.entry
		e.lastRefill = time.Since(s.begun)
		e.totalRefill += e.lastRefill
		e.refills++
		e.lastFailure = ""
		s.phase = ready
		s.begun = time.Now()
		_ = s.conn.SetReadDeadline(time.Time{})
		s.settle()
	case offered:
		s.phase = ready
	}
	if f.ended {
		f.retireLocked(s)
	}
}

// forget is the end of the factory's care for a standby that is a pod's.
func (f *factory) forget(s *standby) {
	f.mu.Lock()
	s.entry.claimed++
	s.entry.backoff = 0
	f.drop(s)
	f.mu.Unlock()
	f.wake()
}

// lost is told of a standby that ended without having been claimed.
func (f *factory) lost(s *standby, err error) {
	f.mu.Lock()
	unwanted := s.phase == retired || f.ended
	early := s.phase == starting || time.Since(s.begun) < settledAfter
	if !early {
		s.entry.backoff = 0
	}
	reason := s.failure
	f.drop(s)
	f.mu.Unlock()
	if !unwanted {
		if reason == "" {
			reason = "the standby ended"
			if err != nil {
				reason += ": " + err.Error()
			}
		}
		if early {
			f.failed(s.entry, reason)
		} else {
			glog.Warningf("factory: standby %d is lost: %s", s.ref.Pid, reason)
		}
	}
	f.wake()
}

// drop takes a standby out of its entry. f.mu is held.
func (f *factory) drop(s *standby) {
	s.entry.standbys = slices.DeleteFunc(s.entry.standbys, func(o *standby) bool { return o == s })
	s.settle()
	close(s.done)
}

// end ends all standbys and waits for them, but not for one that a creator is
// just taking: what becomes of that is between the two.
func (f *factory) end() {
	f.mu.Lock()
	f.ended = true
	var left []*standby
	for _, e := range f.entries {
		for _, s := range e.standbys {
			f.retireLocked(s)
			left = append(left, s)
		}
	}
	f.mu.Unlock()
	limit := time.NewTimer(2 * endTime)
	defer limit.Stop()
	late := false
	for _, s := range left {
		if !late {
			select {
			case <-s.done:
				continue
			case <-limit.C:
				late = true
			}
		}
		f.mu.Lock()
		s.alone = s.phase == offered
		f.mu.Unlock()
		s.expire(0)
		<-s.done
	}
}

func (f *factory) status() *supervisorv1.FactoryStatus {
	f.mu.Lock()
	defer f.mu.Unlock()
	st := &supervisorv1.FactoryStatus{
		Pid: int32(os.Getpid()), StartedUnixNano: f.begun.UnixNano(), Version: f.o.Version,
		Unfit: f.unfit, LastUnfit: clip(f.lastUnfit),
	}
	for _, e := range f.entries {
		x := &supervisorv1.FactoryEntry{
			Vm: e.VM, Size: uint32(e.Size), Claimed: e.claimed, Misses: e.misses, Refills: e.refills,
			LastRefillNano: e.lastRefill.Nanoseconds(), TotalRefillNano: e.totalRefill.Nanoseconds(),
			Failures: e.failures, LastFailure: clip(e.lastFailure),
		}
		for _, s := range e.standbys {
			switch s.phase {
			case starting:
				x.Starting++
			case ready:
				x.Ready++
			}
			x.Supervisors = append(x.Supervisors, &supervisorv1.StandIn{Pid: int32(s.ref.Pid), StartTime: s.ref.StartTime})
		}
		st.Entries = append(st.Entries, x)
	}
	return st
}

// clean removes what a factory that was killed has left.
func clean(path string) {
	dir, err := lockDir(path)
	if err != nil {
		return // there is nothing, or a factory after all
	}
	defer dir.Close()
	f := &factory{o: Options{Dir: path}}
	f.sweep()
	_ = unix.Unlinkat(int(dir.Fd()), SocketFile, 0)
}
