package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// bench is one run of the benchmark.
type bench struct {
	o        options
	children *children
	dir      string // of this run; its name is in every container's id
	busybox  string
	all      []*contender
	others   []*contender // of the further parts
	dirs     []string     // further directories of this run
	checked  string       // what runv says of KVM; empty: nothing yet
	result   *result
	progress func(format string, args ...any)

	mu     sync.Mutex
	nextID int                           // guarded by mu
	alive  map[*contender]map[string]int // guarded by mu; containers that exist, and their pids
	undo   []func(context.Context)       // run last to first by cleanUp
}

func newBench(o options, progress func(string, ...any)) (*bench, error) {
	b := &bench{o: o, progress: progress, alive: map[*contender]map[string]int{}, result: &result{Schema: schema}}
	var err error
	if b.busybox, err = staticBusybox(); err != nil {
		return nil, err
	}
	if b.children, err = newChildren(); err != nil {
		return nil, err
	}
	parent := o.dir
	if parent == "" {
		parent = stateParent()
	}
	if b.dir, err = os.MkdirTemp(parent, "runv-bench-"); err != nil {
		return nil, err
	}
	// Containers get their files from here.
	if err := os.Chmod(b.dir, 0o755); err != nil {
		return nil, err
	}
	b.all = slices.DeleteFunc(peers(o), func(r *contender) bool { return !o.wants(r.name) })
	for i, r := range b.all {
		if err := b.place(r, filepath.Join(b.dir, strconv.Itoa(i))); err != nil {
			return nil, errors.Join(err, os.RemoveAll(b.dir))
		}
	}
	b.result.Machine = describe(b.dir)
	return b, nil
}

// stateParent is where runtimes keep their state on a machine that is set up
// well: on a tmpfs from which programs can be run.
func stateParent() string {
	for _, dir := range []string{"/run", "/dev/shm"} {
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) == nil && st.Type == unix.TMPFS_MAGIC && st.Flags&unix.ST_NOEXEC == 0 {
			return dir
		}
	}
	return os.TempDir()
}

// id is a new container id. It is remembered until remove.
func (b *bench) id(r *contender) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.nextID++
	id := fmt.Sprintf("%s-%d", filepath.Base(b.dir), b.nextID)
	if b.alive[r] == nil {
		b.alive[r] = map[string]int{}
	}
	b.alive[r][id] = 0
	return id
}

// remove removes what may be left of a container, and also does so after ctx of
// the measurement has ended. A container that is gone is no error.
func (b *bench) remove(r *contender, id string) {
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	_, _ = b.children.run(ctx, r.command("delete", "--force", id), stdio{in: r.in})
	b.forget(r, id)
}

func (b *bench) forget(r *contender, id string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.alive[r], id)
}

// inits are the processes that the runtime's containers, and what it prepared,
// are known by.
func (b *bench) inits(r *contender) map[int]bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	pids := map[int]bool{}
	maps.Copy(pids, r.daemons)
	for _, pid := range b.alive[r] {
		if pid > 0 {
			pids[pid] = true
		}
	}
	return pids
}

// create makes a container and notes its process.
func (b *bench) create(ctx context.Context, r *contender, bundle string, out *os.File) (id string, pid int, c call, err error) {
	id = b.id(r)
	pidFile := filepath.Join(r.dir, id+".pid")
	c, err = b.children.run(ctx, r.command("create", "--bundle", r.bundle(bundle), "--pid-file", pidFile, id), stdio{out: out, in: r.in})
	if err != nil {
		return id, 0, c, err
	}
	text, err := os.ReadFile(pidFile)
	if err != nil {
		return id, 0, c, err
	}
	_ = os.Remove(pidFile)
	if pid, err = strconv.Atoi(strings.TrimSpace(string(text))); err != nil {
		return id, 0, c, fmt.Errorf("%s: pid file: %w", r.name, err)
	}
	b.mu.Lock()
	b.alive[r][id] = pid
	b.mu.Unlock()
	return id, pid, c, nil
}

// Operations, in the order of the tables.
var operations = []string{"run", "create", "start", "exec", "exec again", "state", "kill", "delete", "first byte"}

// round measures every operation of a runtime once.
func (b *bench) round(ctx context.Context, r *contender) error {
	if err := b.stocked(ctx, r); err != nil {
		return err
	}
	if err := b.once(ctx, r, "run"); err != nil {
		return err
	}
	if err := b.refill(ctx, r); err != nil {
		return err
	}
	if err := b.stocked(ctx, r); err != nil {
		return err
	}
	if err := b.lifecycle(ctx, r); err != nil {
		return err
	}
	if err := b.stocked(ctx, r); err != nil {
		return err
	}
	return b.firstByte(ctx, r)
}

// once runs a container that ends at once, as an operation of that name.
func (b *bench) once(ctx context.Context, r *contender, operation string) error {
	id := b.id(r)
	c, err := b.children.run(ctx, r.command("run", "--bundle", r.bundle("true"), id), stdio{in: r.in})
	if err != nil {
		b.remove(r, id)
		return err
	}
	b.forget(r, id)
	b.result.add(r.name, operation, c.took)
	return nil
}

// lifecycle is create, start, exec twice, state, kill and delete of a container that
// does nothing. Before delete it waits for the container's end.
func (b *bench) lifecycle(ctx context.Context, r *contender) error {
	id, pid, c, err := b.create(ctx, r, "idle", nil)
	if err != nil {
		b.remove(r, id)
		return err
	}
	b.result.add(r.name, "create", c.took)
	for _, op := range []struct {
		name string
		args []string
	}{
		{"start", []string{"start", id}},
		{"exec", []string{"exec", id, "/bin/true"}},
		{"exec again", []string{"exec", id, "/bin/true"}},
		{"state", []string{"state", id}},
		{"kill", []string{"kill", id, "KILL"}},
	} {
		c, err := b.children.run(ctx, r.command(op.args...), stdio{in: r.in})
		if err != nil {
			b.remove(r, id)
			return err
		}
		b.result.add(r.name, op.name, c.took)
	}
	if err := b.ended(ctx, pid); err != nil {
		b.remove(r, id)
		return fmt.Errorf("%s: %w", r.name, err)
	}
	if c, err = b.children.run(ctx, r.command("delete", id), stdio{in: r.in}); err != nil {
		b.remove(r, id)
		return err
	}
	b.forget(r, id)
	b.result.add(r.name, "delete", c.took)
	return nil
}

// ended waits until a container's process has ended.
func (b *bench) ended(ctx context.Context, pid int) error {
	ctx, cancel := context.WithTimeoutCause(ctx, commandLimit, fmt.Errorf("it lives on for %v", commandLimit))
	defer cancel()
	_, err := b.children.adopted(ctx, pid)
	return err
}

// firstByte takes the time from the fork of create to the first byte of what the
// container writes, with start right behind create.
func (b *bench) firstByte(ctx context.Context, r *contender) error {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return fmt.Errorf("make a pipe: %w", err)
	}
	write := os.NewFile(uintptr(fds[1]), "write")
	defer write.Close()
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return err
	}
	read := os.NewFile(uintptr(fds[0]), "read")
	defer read.Close()

	type arrival struct {
		at  time.Time
		err error
	}
	first := make(chan arrival, 1)
	go func() {
		var buf [1]byte
		_, err := read.Read(buf[:])
		first <- arrival{time.Now(), err}
	}()
	wait := func() arrival {
		// The writer's end closes with the container.
		_ = write.Close()
		_ = read.SetReadDeadline(time.Now().Add(commandLimit))
		return <-first
	}
	id, pid, c, err := b.create(ctx, r, "byte", write)
	defer b.remove(r, id)
	if err == nil {
		_, err = b.children.run(ctx, r.command("start", id), stdio{in: r.in})
	}
	if err != nil {
		_ = read.SetReadDeadline(time.Now())
		<-first
		return err
	}
	a := wait()
	if a.err != nil {
		if errors.Is(a.err, io.EOF) {
			a.err = errors.New("it ended without a word")
		}
		return fmt.Errorf("%s: output of the container: %w", r.name, a.err)
	}
	b.result.add(r.name, "first byte", a.at.Sub(c.began))
	return b.ended(ctx, pid)
}

// failuresAllowed is how often a runtime may fail in a row in one phase.
const failuresAllowed = 3

// operations measures A B C A B C … until the rounds are done or the time is up.
// Every runtime gets one round at least.
func (b *bench) operations(ctx context.Context, limit time.Duration) {
	used := map[*contender]time.Duration{}
	failed := map[*contender]int{}
	out := map[*contender]bool{}
	for round := range b.o.rounds {
		for _, r := range b.available() {
			if ctx.Err() != nil {
				return
			}
			if !out[r] && round > 0 && used[r] >= b.allotted(r, used, round, limit) {
				out[r] = true
				b.result.leaveOut("%s: %d of %d rounds of the operations, for want of time", r.name, round, b.o.rounds)
			}
			if out[r] {
				continue
			}
			b.progress("operations: round %d of %d: %s", round+1, b.o.rounds, r.name)
			t := time.Now()
			err := b.round(ctx, r)
			used[r] += time.Since(t)
			if err == nil {
				failed[r] = 0
				continue
			}
			if ctx.Err() != nil {
				return
			}
			b.result.fail(r.name, err)
			if failed[r]++; failed[r] == failuresAllowed {
				out[r] = true
				b.result.leaveOut("%s: the operations after round %d, because it failed %d times in a row", r.name, round+1, failuresAllowed)
			}
		}
	}
}

// allotted is the time that a runtime may use for all rounds, judged after some.
// Who is slow takes what the others do not need, and no more.
func (b *bench) allotted(r *contender, used map[*contender]time.Duration, rounds int, limit time.Duration) time.Duration {
	rs := b.available()
	needs := make([]time.Duration, len(rs))
	for i, r := range rs {
		needs[i] = used[r] / time.Duration(rounds) * time.Duration(b.o.rounds)
	}
	return share(limit, needs)[slices.Index(rs, r)]
}

// throughput measures complete containers per second, from run to its end, with
// several at once.
func (b *bench) throughput(ctx context.Context, limit time.Duration) {
	steps := b.o.passes * len(b.o.atOnce)
	window := limit / time.Duration(steps*max(1, len(b.available())))
	used := map[*contender]time.Duration{}
	out := map[*contender]int{}
	for pass := range b.o.passes {
		for _, n := range b.o.atOnce {
			for _, r := range b.available() {
				if ctx.Err() != nil {
					return
				}
				// Everything is measured once at least.
				if pass > 0 && used[r]+window > limit/time.Duration(len(b.available())) {
					out[r]++
					continue
				}
				b.progress("starts per second: %d at once, pass %d of %d: %s", n, pass+1, b.o.passes, r.name)
				t := time.Now()
				b.crowd(ctx, r, n, window)
				used[r] += time.Since(t)
			}
		}
	}
	for _, r := range b.available() {
		if out[r] > 0 {
			b.result.leaveOut("%s: %d of %d measurements of starts per second, for want of time", r.name, out[r], steps)
		}
	}
}

// crowd lets n workers run containers until the window closes; what has been
// begun by then is finished and counted.
func (b *bench) crowd(ctx context.Context, r *contender, n int, window time.Duration) {
	if err := b.stocked(ctx, r); err != nil {
		b.result.fail(r.name, err)
		return
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	done := 0
	began := time.Now()
	last := began
	for range n {
		wg.Go(func() {
			for failed := false; !failed && ctx.Err() == nil; {
				id := b.id(r)
				c, err := b.children.run(ctx, r.command("run", "--bundle", r.bundle("true"), id), stdio{in: r.in})
				if failed = err != nil; failed {
					if ctx.Err() == nil {
						b.result.fail(r.name, err)
					}
					b.remove(r, id)
					return
				}
				b.forget(r, id)
				mu.Lock()
				done++
				if end := c.began.Add(c.took); end.After(last) {
					last = end
				}
				mu.Unlock()
				if time.Since(began) > window {
					return
				}
			}
		})
	}
	wg.Wait()
	if done > 0 && ctx.Err() == nil {
		b.result.addRate(r.name, n, float64(done)/last.Sub(began).Seconds())
	}
}

// growth starts idle containers, one after the other, and weighs them on the way.
// It goes by runtime: nobody else has a container meanwhile.
func (b *bench) growth(ctx context.Context, limit time.Duration) {
	began := time.Now()
	// What the quick ones leave is for the slow ones.
	order := b.available()
	slices.SortStableFunc(order, func(x, y *contender) int { return cmp.Compare(b.startTime(x), b.startTime(y)) })
	for i, r := range order {
		if ctx.Err() != nil {
			return
		}
		left := max(0, limit-time.Since(began))
		share := left / time.Duration(len(order)-i)
		b.grow(ctx, r, share)
	}
}

// startTime is what a container of a runtime takes to start, in milliseconds.
func (b *bench) startTime(r *contender) float64 {
	return b.result.of(r.name, "create").Median + b.result.of(r.name, "start").Median
}

func (b *bench) grow(ctx context.Context, r *contender, limit time.Duration) {
	self := os.Getpid()
	table, err := processes("/proc")
	if err != nil {
		b.result.fail(r.name, err)
		return
	}
	before := descendants(table, self)
	most := b.o.grow[len(b.o.grow)-1]
	g := &growth{Runtime: r.name, Wanted: most}
	b.result.Growth = append(b.result.Growth, g)
	defer b.removeAll(r)

	weigh := func(n int) {
		bytes, count, err := b.settled(ctx, r, self, before)
		if err != nil {
			b.result.fail(r.name, err)
			return
		}
		g.Points = append(g.Points, point{Containers: n, PSS: bytes, Processes: count})
	}
	weigh(0)
	began := time.Now()
	next := 0
	for n := 1; n <= most; n++ {
		if ctx.Err() != nil {
			return
		}
		// A fifth of the time is for removing them.
		if n > b.o.grow[0] && time.Since(began) > limit*4/5 {
			g.LeftOut = fmt.Sprintf("containers %d to %d, for want of time", n, most)
		} else if meminfo("MemAvailable") < meminfo("MemTotal")/8 {
			g.LeftOut = fmt.Sprintf("containers %d to %d, for want of memory", n, most)
		}
		if g.LeftOut != "" {
			b.result.leaveOut("%s: %s", r.name, g.LeftOut)
			if len(g.Points) > 0 && g.Points[len(g.Points)-1].Containers < n-1 {
				weigh(n - 1)
			}
			return
		}
		b.progress("growth: container %d of %d: %s", n, most, r.name)
		id, _, create, err := b.create(ctx, r, "idle", nil)
		var start call
		if err == nil {
			start, err = b.children.run(ctx, r.command("start", id), stdio{in: r.in})
		}
		if err != nil {
			if ctx.Err() == nil {
				b.result.fail(r.name, err)
				g.LeftOut = fmt.Sprintf("containers %d to %d, because one failed", n, most)
				b.result.leaveOut("%s: %s", r.name, g.LeftOut)
			}
			return
		}
		g.StartMS = append(g.StartMS, milliseconds(create.took+start.took))
		if n == b.o.grow[next] {
			weigh(n)
			next++
		}
	}
}

// settled weighs until two weighings in a row differ by less than one percent,
// or ten have been done.
func (b *bench) settled(ctx context.Context, r *contender, self int, before map[int]bool) (int64, int, error) {
	tick := time.NewTicker(150 * time.Millisecond)
	defer tick.Stop()
	var last int64 = -1
	for try := 0; ; try++ {
		table, err := processes("/proc")
		if err != nil {
			return 0, 0, err
		}
		bytes, count, err := totalPSS("/proc", belonging(table, self, r.dir, b.inits(r), before))
		if err != nil {
			return 0, 0, err
		}
		if last >= 0 && math.Abs(float64(bytes-last)) <= float64(last)/100 || try == 10 {
			return bytes, count, nil
		}
		last = bytes
		select {
		case <-tick.C:
		case <-ctx.Done():
			return 0, 0, context.Cause(ctx)
		}
	}
}

// removeAll removes every container of a runtime, some at a time.
func (b *bench) removeAll(r *contender) {
	b.mu.Lock()
	var ids []string
	for id := range b.alive[r] {
		ids = append(ids, id)
	}
	b.mu.Unlock()
	var wg sync.WaitGroup
	turn := make(chan struct{}, 4)
	for _, id := range ids {
		turn <- struct{}{}
		wg.Go(func() {
			b.remove(r, id)
			<-turn
		})
	}
	wg.Wait()
}

// available are the runtimes that take part.
func (b *bench) available() []*contender {
	var rs []*contender
	for _, r := range b.all {
		if r.why == "" {
			rs = append(rs, r)
		}
	}
	return rs
}

// starts measures everything about starts and fills b.result, as far as ctx lets
// it.
func (b *bench) starts(ctx context.Context) {
	began := time.Now()
	for _, r := range b.all {
		b.progress("looking for %s", r.name)
		if err := b.ready(ctx, r); err != nil {
			if ctx.Err() != nil {
				return
			}
			r.why = err.Error()
		}
	}
	for _, r := range b.all {
		b.result.Runtimes = append(b.result.Runtimes, contenderInfo{
			Name: r.name, Program: filepath.Base(r.program), Version: r.version, Flags: b.shown(r), Note: r.note, Why: r.why,
		})
	}
	left := b.o.time - time.Since(began)
	b.operations(ctx, left*4/10)
	if ctx.Err() != nil {
		return
	}
	left = b.o.time - time.Since(began)
	b.throughput(ctx, left*4/10)
	if ctx.Err() != nil {
		return
	}
	// What took longer than it should must not cost the others this.
	b.growth(ctx, max(b.o.time-time.Since(began), b.o.time/4))
	b.result.Machine.Load[1] = loadAverage()
	b.result.Seconds = time.Since(began).Seconds()
}

// shown are the flags without the paths of this run.
func (b *bench) shown(r *contender) []string {
	var flags []string
	for i := 0; i < len(r.flags); i++ {
		switch f := r.flags[i]; f {
		case "--kernel", "--initrd":
			i++
		default:
			flags = append(flags, strings.ReplaceAll(f, "{template}", "DIR"))
		}
	}
	return flags
}

// cleanUp leaves nothing: no container, process, cgroup or directory. What lives
// on after the runtimes have removed their containers is killed by its pid and
// reported.
func (b *bench) cleanUp() error {
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	for _, r := range slices.Concat(b.all, b.others) {
		b.removeAll(r)
	}
	for i := len(b.undo) - 1; i >= 0; i-- {
		b.undo[i](ctx)
	}
	killed, err := b.killAll(ctx)
	if killed > 0 {
		err = errors.Join(err, fmt.Errorf("%d processes that the runtimes left behind were killed", killed))
	}
	err = errors.Join(err, removeCgroups("/sys/fs/cgroup", filepath.Base(b.dir)+"-"))
	for _, dir := range append(b.dirs, b.dir) {
		for _, m := range mountsBelow(dir) {
			if uerr := unix.Unmount(m, unix.MNT_DETACH); uerr == nil {
				err = errors.Join(err, fmt.Errorf("a mount that a runtime left behind was removed: %s", m))
			}
		}
		err = errors.Join(err, os.RemoveAll(dir))
	}
	return err
}

// killAll kills what descends from this process until there is nothing.
func (b *bench) killAll(ctx context.Context) (killed int, err error) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	seen := map[int]bool{}
	for try := 0; ; try++ {
		table, err := processes("/proc")
		if err != nil {
			return len(seen), err
		}
		rest := descendants(table, os.Getpid())
		if len(rest) == 0 {
			return len(seen), nil
		}
		// Those that are ending by themselves get a second to do so.
		if try > 50 {
			for pid := range rest {
				seen[pid] = true
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return len(seen), fmt.Errorf("%d processes of the runtimes cannot be killed", len(rest))
		}
	}
}

// removeCgroups removes the groups whose names begin with prefix; nothing else
// is given such a name.
func removeCgroups(dir, prefix string) error {
	var err error
	_ = filepath.WalkDir(dir, func(path string, d os.DirEntry, werr error) error {
		if werr != nil || !d.IsDir() {
			return nil
		}
		if strings.HasPrefix(d.Name(), prefix) {
			if rerr := os.Remove(path); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
				err = errors.Join(err, rerr)
			}
			return filepath.SkipDir
		}
		return nil
	})
	return err
}

// mountsBelow are the mount points below dir, innermost first.
func mountsBelow(dir string) []string {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	var found []string
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			found = append([]string{f[4]}, found...)
		}
	}
	return found
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
