package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/u-root/u-root/pkg/cpio"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/hyperhq/runv/tests/bench/load"
)

// The columns of the network. Each has an address on one bridge, the same program
// that serves there, and clients that run in a namespace on that bridge. bareQEMU
// has runv's kernel, initrd and machine, and its tap is a port of the bridge.
const (
	columnRunv = "runv"
	columnBare = "bare QEMU"
)

var networkColumns = []string{columnRunv, columnBare, "runc", "crun"}

// The rows. What the client prints is divided into them by package load.
var networkQuantities = []quantity{
	{"receive", "sent by the container", "MB/s", 1e-6},
	{"send", "received by the container", "MB/s", 1e-6},
	{"connect", "new connections", "per second", 1},
	{"latency", "one byte there and back", "µs", 1e6},
	{"receive vcpu", "sending: the virtual processor's thread", "% of a core", 100},
	{"receive rest", "sending: QEMU's other threads", "% of a core", 100},
	{"send vcpu", "receiving: the virtual processor's thread", "% of a core", 100},
	{"send rest", "receiving: QEMU's other threads", "% of a core", 100},
}

// windows are the measurements of one round of a column.
var windows = []string{"receive", "send", "connect", "latency"}

const (
	networkRounds = 5
	networkPort   = 7
	bridgeName    = "br0"
	cardName      = "eth0"
)

// lan is a bridge in a network namespace of its own and namespaces on it. None has
// a name: they are gone when nobody is in them any more.
type lan struct {
	hub  *namespace
	used byte // addresses
}

// place is a network namespace on the bridge.
type place struct {
	ns      *namespace
	file    *os.File // the namespace
	address netip.Prefix
}

func (p *place) server() string { return fmt.Sprintf("%s:%d", p.address.Addr(), networkPort) }

// path names the namespace as long as this process lives.
func (p *place) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), p.file.Fd()) }

func newNetns() (*namespace, error) {
	n, err := newNamespace(func() error { return unix.Unshare(unix.CLONE_NEWNET) })
	if err != nil {
		return nil, fmt.Errorf("make a network namespace: %w", err)
	}
	return n, nil
}

// try runs f in a namespace.
func (n *namespace) try(f func() error) error {
	var err error
	n.do(func() { err = f() })
	return err
}

func newLAN() (*lan, error) {
	hub, err := newNetns()
	if err != nil {
		return nil, err
	}
	err = hub.try(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = bridgeName
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
			return fmt.Errorf("make a bridge: %w", err)
		}
		return up(bridgeName)
	})
	if err != nil {
		hub.close()
		return nil, err
	}
	return &lan{hub: hub}, nil
}

func up(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

// address is one that nobody has.
func (l *lan) address() netip.Prefix {
	l.used++
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 77, 0, l.used}), 24)
}

// place makes a namespace with a card on the bridge, as a container engine does.
func (l *lan) place() (*place, error) {
	ns, err := newNetns()
	if err != nil {
		return nil, err
	}
	p := &place{ns: ns, address: l.address()}
	if err := l.join(p); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func (l *lan) join(p *place) error {
	err := p.ns.try(func() (err error) {
		p.file, err = os.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
		return err
	})
	if err != nil {
		return err
	}
	err = l.hub.try(func() error {
		bridge, err := netlink.LinkByName(bridgeName)
		if err != nil {
			return err
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "port" + strconv.Itoa(int(l.used))
		attrs.MasterIndex = bridge.Attrs().Index
		veth := &netlink.Veth{LinkAttrs: attrs, PeerName: cardName, PeerNamespace: netlink.NsFd(int(p.file.Fd()))}
		if err := netlink.LinkAdd(veth); err != nil {
			return fmt.Errorf("make a pair of interfaces: %w", err)
		}
		return up(attrs.Name)
	})
	if err != nil {
		return err
	}
	return p.ns.try(func() error {
		card, err := netlink.LinkByName(cardName)
		if err != nil {
			return err
		}
		addr, err := netlink.ParseAddr(p.address.String())
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(card, addr); err != nil {
			return fmt.Errorf("give %s the address %s: %w", cardName, p.address, err)
		}
		return errors.Join(up("lo"), up(cardName))
	})
}

func (p *place) close() {
	if p.file != nil {
		p.file.Close()
	}
	p.ns.close()
}

// tap makes a tap that is a port of the bridge. It is gone with its file.
func (l *lan) tap() (*os.File, error) {
	const name = "tap0"
	var f *os.File
	err := l.hub.try(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open /dev/net/tun: %w", err)
		}
		f = os.NewFile(uintptr(fd), name)
		req, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
			return fmt.Errorf("make a tap: %w", err)
		}
		bridge, err := netlink.LinkByName(bridgeName)
		if err != nil {
			return err
		}
		tap, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetMaster(tap, bridge), up(name))
	})
	if err != nil && f != nil {
		f.Close()
	}
	return f, err
}

// server is a column while its server runs.
type server struct {
	address string
	qemu    int // pid; 0: there is none
}

// network measures the part.
func (b *bench) network(ctx context.Context, p *part, limit time.Duration) error {
	began := time.Now()
	p.Quantities, p.Beside = networkQuantities, []string{"runc", columnBare}
	host := filepath.Join(b.dir, partNetwork)
	if err := os.Mkdir(host, 0o755); err != nil {
		return err
	}
	program, err := installLoad(host)
	if err != nil {
		return err
	}
	l, err := newLAN()
	if err != nil {
		return err
	}
	defer l.hub.close()
	clients, err := l.place()
	if err != nil {
		return err
	}
	defer clients.close()

	servers := map[string]server{}
	var columns []string
	for _, r := range []*contender{b.o.vm(columnRunv, cold...), nil, runc(), crun()} {
		name := columnBare
		if r != nil {
			name = r.name
		}
		if !b.o.wants(name) && (name != columnRunv || !b.o.wants(columnBare)) {
			continue
		}
		b.progress("%s: starting %s", p.Name, name)
		var s server
		var info contenderInfo
		if r == nil {
			var stop func()
			s, info, stop, err = b.bareServer(ctx, l, servers[columnRunv].qemu, program)
			defer stop()
		} else {
			var done func()
			s, done, err = b.networkServer(ctx, l, r, filepath.Join(host, r.name), program)
			defer done()
			info = b.info(r, err)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err == nil {
			servers[name] = s
		}
		if !b.o.wants(name) {
			continue
		}
		if err == nil {
			columns = append(columns, name)
		}
		p.Columns = append(p.Columns, info)
	}

	// The first time everything is translated.
	const warmUp = 300 * time.Millisecond
	left := limit - time.Since(began) - time.Duration(len(columns)*len(windows))*warmUp
	rounds := min(networkRounds, b.o.rounds)
	window := left / time.Duration(rounds*len(windows)*max(1, len(columns)))
	window = max(200*time.Millisecond, min(2*time.Second, window)).Round(10 * time.Millisecond)
	measure := func(column, what string, span time.Duration) (float64, error) {
		text, err := b.children.output(ctx, clients.ns, program, what, servers[column].address, span.String())
		if err != nil {
			return 0, err
		}
		return strconv.ParseFloat(strings.TrimSpace(text), 64)
	}
	for _, c := range columns {
		for _, w := range windows {
			if _, err := measure(c, w, warmUp); err != nil {
				return fmt.Errorf("%s: %w", c, err)
			}
		}
	}
	p.Notes = append(p.Notes, fmt.Sprintf("Each sample is the mean of %v.", window))
	b.rounds(ctx, p, columns, rounds, 2*limit, func(column string) error {
		for _, w := range windows {
			before, err := threadTimes(servers[column].qemu)
			if err != nil {
				return err
			}
			t := time.Now()
			x, err := measure(column, w, window)
			if err != nil {
				return err
			}
			took := time.Since(t)
			after, err := threadTimes(servers[column].qemu)
			if err != nil {
				return err
			}
			p.add(column, w, x)
			if servers[column].qemu > 0 && slices.Contains([]string{"send", "receive"}, w) {
				p.add(column, w+" vcpu", (after.vcpu-before.vcpu).Seconds()/took.Seconds())
				p.add(column, w+" rest", (after.rest-before.rest).Seconds()/took.Seconds())
			}
		}
		return nil
	})
	return nil
}

// networkServer starts a container that serves. done is to be called in any case.
func (b *bench) networkServer(ctx context.Context, l *lan, r *contender, dir, program string) (_ server, done func(), err error) {
	var undo []func()
	done = func() {
		for _, f := range slices.Backward(undo) {
			f()
		}
	}
	r.untried = r.name == columnRunv
	if err := b.enter(ctx, r, dir); err != nil {
		return server{}, done, err
	}
	at, err := l.place()
	if err != nil {
		return server{}, done, err
	}
	undo = append(undo, at.close, func() { b.removeAll(r) })
	rootfs := filepath.Join(r.dir, "bundles", "rootfs")
	if err := copyFile(filepath.Join(rootfs, "bin", load.Program), program); err != nil {
		return server{}, done, err
	}
	spec := config(rootfs, []string{"/bin/" + load.Program, "serve", strconv.Itoa(networkPort)})
	for i, ns := range spec.Linux.Namespaces {
		if ns.Type == specs.NetworkNamespace {
			spec.Linux.Namespaces[i].Path = at.path()
		}
	}
	if err := makeBundle(r.bundle(partNetwork), spec); err != nil {
		return server{}, done, err
	}
	read, write, err := pipe()
	if err != nil {
		return server{}, done, err
	}
	undo = append(undo, func() { read.Close() })
	id, _, _, err := b.create(ctx, r, partNetwork, write)
	write.Close()
	if err == nil {
		_, err = b.children.run(ctx, r.command("start", id), stdio{in: r.in})
	}
	if err == nil {
		err = untilReady(ctx, read)
	}
	if err != nil {
		return server{}, done, err
	}
	qemu, err := emulatorOf(id)
	return server{at.server(), qemu}, done, err
}

// emulatorOf is the QEMU of a container's pod, 0 if there is none.
func emulatorOf(id string) (int, error) {
	table, err := processes("/proc")
	if err != nil {
		return 0, err
	}
	for _, p := range table {
		for i, a := range p.args {
			if i > 0 && p.args[i-1] == "-name" && strings.HasPrefix(a+",", "guest="+id+",") {
				return p.pid, nil
			}
		}
	}
	return 0, nil
}

// bareServer boots a virtual machine that serves: it has the machine of runv's
// and a card, and nothing else. stop is to be called in any case.
func (b *bench) bareServer(ctx context.Context, l *lan, model int, program string) (_ server, info contenderInfo, stop func(), err error) {
	info = contenderInfo{Name: columnBare}
	stop = func() {}
	defer func() {
		if err != nil {
			info.Why = err.Error()
		}
	}()
	switch {
	case model == 0:
		return server{}, info, stop, errors.New("runv's VM, whose machine it is to have, does not run")
	case b.o.initrd == "":
		return server{}, info, stop, errors.New("needs --initrd")
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", model))
	if err != nil {
		return server{}, info, stop, err
	}
	address := l.address()
	initrd := filepath.Join(filepath.Dir(program), "initrd")
	if err := appendInit(initrd, b.o.initrd, program); err != nil {
		return server{}, info, stop, err
	}
	args, err := bareArgs(strings.Split(strings.TrimRight(string(text), "\x00"), "\x00"), initrd, address)
	if err != nil {
		return server{}, info, stop, err
	}
	info.Program, info.Note = filepath.Base(args[0]), "machine and kernel of runv's"
	if text, err := b.children.output(ctx, nil, args[0], "--version"); err == nil {
		if _, rest, ok := strings.Cut(text, "version "); ok {
			info.Version, _, _ = strings.Cut(strings.TrimSpace(rest), " ")
			info.Version, _, _ = strings.Cut(info.Version, "\n")
		}
	}
	tap, err := l.tap()
	if err != nil {
		return server{}, info, stop, err
	}
	defer tap.Close()
	read, write, err := pipe()
	if err != nil {
		return server{}, info, stop, err
	}
	pid, kill, err := b.children.background(args, stdio{out: write, in: l.hub}, tap)
	write.Close()
	if err != nil {
		read.Close()
		return server{}, info, stop, err
	}
	stop = func() {
		kill()
		read.Close()
	}
	if err := untilReady(ctx, read); err != nil {
		return server{}, info, stop, err
	}
	return server{fmt.Sprintf("%s:%d", address.Addr(), networkPort), pid}, info, stop, nil
}

// bareArgs takes from runv's arguments what makes the machine, and adds what a
// server needs.
func bareArgs(model []string, initrd string, address netip.Prefix) ([]string, error) {
	keep := map[string]bool{"-machine": true, "-accel": true, "-global": true, "-cpu": true, "-smp": true, "-m": true, "-kernel": true}
	args := []string{model[0], "-name", "guest=bare,debug-threads=on", "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"}
	device := "virtio-net-device"
	params := ""
	for i := 1; i+1 < len(model); i++ {
		option, value := model[i], model[i+1]
		switch {
		case keep[option], option == "-object" && strings.HasPrefix(value, "memory-backend-ram,"):
			args = append(args, option, value)
		case option == "-append":
			params = value
		case option == "-device" && strings.HasPrefix(value, "virtio-net-"):
			device, _, _ = strings.Cut(value, ",")
		default:
			continue
		}
		i++
	}
	if params == "" || !slices.Contains(args, "-kernel") {
		return nil, errors.New("the arguments of runv's QEMU name no kernel or have no -append")
	}
	params += fmt.Sprintf(" rdinit=/%s -- guest %s %d", load.Program, address, networkPort)
	return append(args, "-initrd", initrd, "-append", params, "-serial", "stdio",
		"-netdev", "tap,id=net0,fd=3", "-device", device+",netdev=net0"), nil
}

// appendInit makes an initrd that has the program, too. The kernel unpacks one
// archive after the other.
func appendInit(path, initrd, program string) error {
	text, err := os.ReadFile(initrd)
	if err != nil {
		return err
	}
	code, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	defer out.Close()
	// Archives begin at multiples of four bytes.
	if _, err := out.Write(append(text, make([]byte, -len(text)&3)...)); err != nil {
		return err
	}
	w := cpio.Newc.Writer(out)
	if err := w.WriteRecord(cpio.StaticFile(load.Program, string(code), 0o755)); err != nil {
		return err
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return err
	}
	return out.Close()
}

// threads is the processor time of QEMU's threads.
type threads struct{ vcpu, rest time.Duration }

// threadTimes reads it; 0 is no process. The kernel counts in hundredths of a
// second (proc(5), USER_HZ), and QEMU names the threads.
func threadTimes(pid int) (threads, error) {
	var sum threads
	if pid == 0 {
		return sum, nil
	}
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil {
		return sum, err
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue // it has ended
		}
		name, t, err := threadTime(string(text))
		if err != nil {
			return sum, err
		}
		if strings.HasPrefix(name, "CPU ") {
			sum.vcpu += t
		} else {
			sum.rest += t
		}
	}
	return sum, nil
}

// threadTime takes the name, and user and system time, from the text of
// /proc/PID/task/TID/stat.
func threadTime(stat string) (name string, _ time.Duration, err error) {
	begin, end := strings.IndexByte(stat, '('), strings.LastIndexByte(stat, ')')
	if begin < 0 || end < begin {
		return "", 0, fmt.Errorf("stat has no name: %q", stat)
	}
	f := strings.Fields(stat[end+1:])
	if len(f) < 13 {
		return "", 0, fmt.Errorf("stat is cut off: %q", stat)
	}
	var ticks uint64
	for _, s := range f[11:13] {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			return "", 0, fmt.Errorf("stat has no times: %q", stat)
		}
		ticks += n
	}
	return stat[begin+1 : end], time.Duration(ticks) * 10 * time.Millisecond, nil
}
