package tests

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// peerProgram is testdata/peer, built once.
var peerProgram = sync.OnceValues(func() (string, error) {
	path := filepath.Join(host.dir, "peer")
	cmd := exec.Command("go", "build", "-buildvcs=false", "-ldflags", "-s -w", "-o", path, "./testdata/peer")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build testdata/peer: %w: %s", err, out)
	}
	return path, nil
})

// transferBytes is how much goes each way: RUNV_TEST_NET_MIB, in MiB. An emulated
// guest moves 40 to 70 MB in a second.
func transferBytes() int64 {
	if n, err := strconv.ParseInt(os.Getenv("RUNV_TEST_NET_MIB"), 10, 64); err == nil && n > 0 {
		return n << 20
	}
	return 1 << 30
}

// wire is a bridge in a network namespace of its own, which plays the host, and
// namespaces with an interface on it.
type wire struct {
	r    *rt
	host string
	n    int
}

func (r *rt) wire() *wire {
	r.t.Helper()
	if _, err := exec.LookPath("ip"); err != nil {
		skip(r.t, "%v", err)
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		skip(r.t, "%v", err)
	}
	w := &wire{r: r, host: r.name() + "h"}
	w.netns(w.host)
	w.in(w.host, "ip link set lo up; ip link add br0 type bridge; ip link set br0 up mtu 9000; ip addr add 10.77.0.1/24 dev br0; ip -6 addr add fd77::1/64 dev br0 nodad")
	return w
}

func (w *wire) netns(name string) {
	w.r.t.Helper()
	w.r.sh("ip netns add " + name)
	// After the containers are gone, before the comparison of what is left.
	w.r.atEnd(func() { w.r.sh("ip netns del " + name) })
}

// atEnd runs f when the test's containers are gone, before leaks are looked for.
func (r *rt) atEnd(f func()) { *r.ends = append(*r.ends, f) }

// sh runs a script on the host.
func (r *rt) sh(script string) string {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*commandTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, "sh", "-ec", script).CombinedOutput()
	if err != nil {
		r.t.Errorf("%s: %v: %s", script, err, out)
	}
	return string(out)
}

// in runs a script in a namespace.
func (w *wire) in(ns, script string) string {
	w.r.t.Helper()
	return w.r.sh("ip netns exec " + ns + " sh -ec '" + script + "'")
}

// pod makes a namespace with the address n on the bridge.
func (w *wire) pod(n, mtu int) string {
	w.r.t.Helper()
	w.n++
	name := w.host + strconv.Itoa(w.n)
	w.netns(name)
	w.attach(name, "eth0", n, mtu)
	w.in(name, "ip link set lo up; ip route add default via 10.77.0.1; ip -6 route add default via fd77::1")
	return name
}

func (w *wire) attach(ns, dev string, n, mtu int) {
	w.r.t.Helper()
	w.r.sh(fmt.Sprintf(`ip -n %s link add p%d mtu %d type veth peer name %s mtu %d netns %s
		ip -n %s link set p%d master br0 up
		ip -n %s addr add 10.77.0.%d/24 dev %s; ip -n %s -6 addr add fd77::%d/64 dev %s nodad
		ip -n %s link set %s up`, w.host, n, mtu, dev, mtu, ns, w.host, n, ns, n, dev, ns, n, dev, ns, dev))
}

// look is what has to be left in a namespace as it was found.
func (w *wire) look(ns string) string {
	return w.in(ns, `ip -br link | sort; ip -o addr | sed "s/ tentative//" | sort; ip route; ip -6 route; tc qdisc show dev eth0; tc filter show dev eth0 ingress`)
}

// inNetns is a change of a spec.
func inNetns(ns string) func(*specs.Spec) {
	return func(s *specs.Spec) {
		for i := range s.Linux.Namespaces {
			if s.Linux.Namespaces[i].Type == specs.NetworkNamespace {
				s.Linux.Namespaces[i].Path = "/run/netns/" + ns
			}
		}
		caps := append([]string{"CAP_NET_RAW"}, defaultCaps...)
		s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
	}
}

// peer starts a container that serves port 7 in a namespace.
func (w *wire) peer(ns string) (id string) {
	r := w.r
	r.t.Helper()
	program, err := peerProgram()
	if err != nil {
		r.t.Fatal(err)
	}
	s := spec("/bin/sh", "-c", "/bin/peer serve 7 >/data/out 2>&1")
	inNetns(ns)(s)
	bundle := r.bundle(s)
	r.sh("cp " + program + " " + bundle + "/rootfs/bin/peer")
	id = r.name()
	r.ok("run", "--detach", "--bundle", bundle, id)
	out := filepath.Join(bundle, "rootfs/data/out")
	waitFor(r.t, "the server in the pod", func() bool {
		text, _ := os.ReadFile(out)
		return strings.Contains(string(text), "ready")
	})
	return id
}

// hostPeer starts the server in a namespace of the host.
func (w *wire) hostPeer(ns string) {
	w.r.t.Helper()
	program, err := peerProgram()
	if err != nil {
		w.r.t.Fatal(err)
	}
	out := filepath.Join(w.r.dir, "peer-"+ns)
	f, err := os.Create(out)
	if err != nil {
		w.r.t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command("ip", "netns", "exec", ns, program, "serve", "7")
	cmd.Stdout, cmd.Stderr = f, f
	if err := cmd.Start(); err != nil {
		w.r.t.Fatal(err)
	}
	w.r.atEnd(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	waitFor(w.r.t, "the server on the host", func() bool {
		text, _ := os.ReadFile(out)
		return strings.Contains(string(text), "ready")
	})
}

// hostRun runs the program in a namespace of the host.
func (w *wire) hostRun(ns string, args ...string) {
	w.r.t.Helper()
	program, _ := peerProgram()
	w.r.t.Log("host: " + strings.TrimSpace(w.in(ns, program+" "+strings.Join(args, " "))))
}

// podRun runs it in a pod.
func (w *wire) podRun(id string, args ...string) {
	w.r.t.Helper()
	res := w.r.try(append([]string{"exec", id, "/bin/peer"}, args...)...)
	if res.code != 0 {
		w.r.t.Errorf("in the pod: %s: code %d: %s", strings.Join(args, " "), res.code, res.stderr)
		return
	}
	w.r.t.Log("pod: " + strings.TrimSpace(res.stdout))
}

func (w *wire) ping(ns, addr string) {
	w.r.t.Helper()
	w.in(ns, "busybox ping -c 1 -W 10 "+addr)
}

// The tests of this file do not run beside others: what they send takes all of the
// machine, and others would wait too long for what they wait for.

// Two pods on a bridge, cloned from one template: what they and the host can do
// with each other, in both families, and what is left of it.
func TestPodNetwork(t *testing.T) {
	vmOnly(t)
	r := newRT(t)
	clones, _ := r.cloning()
	w := clones.wire()
	a, b := w.pod(2, 9000), w.pod(3, 9000)
	before := w.look(a)
	hostBefore := w.in(w.host, "ip -br link | sort; tc qdisc")
	ida, idb := w.peer(a), w.peer(b)
	w.hostPeer(w.host)

	t.Run("as on the host", func(t *testing.T) {
		for _, dir := range []string{"ip -o addr show eth0", "ip route", "ip -6 route"} {
			t.Logf("%s: %s", dir, clones.exec(ida, "sh", "-c", dir))
		}
		out := clones.exec(ida, "sh", "-c", "ip link show eth0; ip addr show eth0; ip route; ip -6 route")
		mac := strings.TrimSpace(w.in(a, "cat /sys/class/net/eth0/address"))
		for _, want := range []string{"mtu 9000", mac, "10.77.0.2/24", "fd77::2/64", "default via 10.77.0.1 dev eth0", "default via fd77::1 dev eth0"} {
			if !strings.Contains(out, want) {
				t.Errorf("the pod lacks %q:\n%s", want, out)
			}
		}
		if strings.Contains(out, "tentative") || strings.Contains(clones.exec(ida, "ip", "link"), "eth1") {
			t.Errorf("the pod has what it should not:\n%s\n%s", out, clones.exec(ida, "ip", "link"))
		}
	})
	t.Run("reach", func(t *testing.T) {
		w := w.of(t)
		for _, addr := range []string{"10.77.0.2", "fd77::2", "10.77.0.3", "fd77::3"} {
			w.ping(w.host, addr)
		}
		for _, addr := range []string{"10.77.0.1", "fd77::1", "10.77.0.3", "fd77::3"} {
			w.r.exec(ida, "ping", "-c", "1", "-W", "10", addr)
		}
		// Whole and in fragments, and as large as the MTU.
		for _, size := range []string{"1", "1400", "8900", "20000"} {
			w.hostRun(w.host, "udp", "10.77.0.2:7", size)
			w.podRun(ida, "udp", "[fd77::3]:7", size)
		}
	})
	t.Run("transfer", func(t *testing.T) {
		w := w.of(t)
		n := strconv.FormatInt(transferBytes(), 10)
		w.hostRun(w.host, "send", "10.77.0.2:7", n)
		w.hostRun(w.host, "receive", "[fd77::2]:7", n)
		some := strconv.FormatInt(transferBytes()/16, 10)
		w.podRun(ida, "send", "10.77.0.1:7", some)
		w.podRun(idb, "receive", "[fd77::1]:7", some)
		w.podRun(ida, "send", "10.77.0.3:7", some)
		w.podRun(ida, "receive", "[fd77::3]:7", some)
	})
	t.Run("connections", func(t *testing.T) {
		w := w.of(t)
		w.hostRun(w.host, "connect", "10.77.0.2:7", "10000")
		w.hostRun(w.host, "connect", "[fd77::3]:7", "1000")
		w.podRun(ida, "connect", "10.77.0.1:7", "1000")
		w.podRun(ida, "connect", "[fd77::3]:7", "500")
	})

	r.ok("delete", "--force", idb)
	if !r.kill9(supervisor) {
		t.Error("there is no supervisor")
	}
	clones.waitStatus(ida, "stopped")
	clones.ok("delete", "--force", ida)
	if after := w.look(a); after != before {
		t.Errorf("a pod's namespace was\n%s\nand is, after a crash and delete,\n%s", before, after)
	}
	if after := w.in(w.host, "ip -br link | sort; tc qdisc"); after != hostBefore {
		t.Errorf("the host was\n%s\nand is\n%s", hostBefore, after)
	}
}

func (w *wire) of(t *testing.T) *wire {
	c := *w
	c.r = w.r.in(t)
	return &c
}

// interfaceLine is one of `interface ls`.
type interfaceLine struct {
	Name, Kind, MAC, Problem string
	MTU                      int
	Up, Added                bool
	Addresses                []string
	Card                     *int
}

func (r *rt) interfaces(id string) map[string]interfaceLine {
	r.t.Helper()
	var list []interfaceLine
	out := r.ok("interface", "ls", "--format", "json", id)
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		r.t.Fatalf("interface ls: %v in %q", err, out)
	}
	m := make(map[string]interfaceLine)
	for _, l := range list {
		m[l.Name] = l
	}
	return m
}

// Interfaces that come, change and go while the pod runs: made by others, and by
// the command.
func TestPodNetworkChanges(t *testing.T) {
	vmOnly(t)
	r := newRT(t)
	r.flags = append(r.flags, "--nics", "2")
	w := r.wire()
	ns := w.pod(2, 1500)
	before := w.look(ns)
	id := r.running(inNetns(ns))
	has := func(what string, cmd string, want ...string) {
		t.Helper()
		var out string
		ok := func() bool {
			out = r.exec(id, "sh", "-c", cmd)
			for _, x := range want {
				if strings.Contains(out, strings.TrimPrefix(x, "!")) == strings.HasPrefix(x, "!") {
					return false
				}
			}
			return true
		}
		for start := time.Now(); !ok(); time.Sleep(100 * time.Millisecond) {
			if time.Since(start) > 20*time.Second {
				t.Fatalf("%s: want %q, the pod has\n%s", what, want, out)
			}
		}
	}
	all := "ip -o link; ip -o addr; ip route; ip -6 route"
	has("the first", all, "eth0", "10.77.0.2/24", "!eth1")

	// As an engine does it that connects a network.
	w.attach(ns, "eth1", 20, 9000)
	has("a second interface", all, "eth1", "mtu 9000", "10.77.0.20/24", "fd77::20/64")
	w.ping(w.host, "10.77.0.20")
	w.in(ns, "ip addr add 10.78.0.1/24 dev eth1; ip route add 10.79.0.0/16 via 10.78.0.9; ip link set eth1 mtu 1400")
	has("changes", all, "10.78.0.1/24", "10.79.0.0/16 via 10.78.0.9", "mtu 1400")
	neighbour := "ip neigh replace 10.78.0.9 lladdr 02:00:00:00:78:09 dev eth1 nud permanent"
	w.in(ns, neighbour+"; ip -6 neigh add fd77::99 lladdr 02:00:00:00:77:99 dev eth0 nud permanent")
	neighbours := []string{"10.78.0.9 dev eth1 lladdr 02:00:00:00:78:09", "fd77::99 dev eth0 lladdr 02:00:00:00:77:99"}
	has("neighbours", "ip neigh; ip -6 neigh", neighbours...)
	// The kernel forgets neighbours when the interface's own address changes.
	w.in(ns, "ip link set eth1 address 02:00:00:00:20:20; "+neighbour)
	has("an address", "ip neigh; ip -6 neigh; ip link", append(neighbours, "02:00:00:00:20:20")...)
	w.in(ns, "ip neigh del 10.78.0.9 dev eth1; ip -6 neigh del fd77::99 dev eth0; ip route del 10.79.0.0/16; ip addr del 10.78.0.1/24 dev eth1")
	has("all of it gone", all+"; ip neigh; ip -6 neigh", "!10.78.0.9", "!fd77::99", "!10.79.0.0", "!10.78.0.1")
	r.exec(id, "sh", "-c", "true") // what the pod itself does stays, below

	w.attach(ns, "eth2", 21, 1500)
	waitFor(t, "eth2 to be refused", func() bool { return strings.Contains(r.interfaces(id)["eth2"].Problem, "all 2 network cards") })
	if out := r.exec(id, "ip", "link"); strings.Contains(out, "eth2") {
		t.Errorf("a third interface with two cards: %s", out)
	}
	w.in(ns, "ip link del eth1")
	has("the third after the second's end", all, "!eth1", "!10.79.0.0", "eth2", "10.77.0.21/24")
	w.ping(w.host, "fd77::21")
	w.in(ns, "ip link set eth2 down")
	has("down", "ip link show eth2", "!UP")
	w.in(ns, "ip link set eth2 up; ip link set eth2 name net7 2>/dev/null || { ip link set eth2 down; ip link set eth2 name net7; ip link set net7 up; }")
	has("renamed", all, "net7", "!eth2", "10.77.0.21/24")
	w.in(ns, "ip link del net7")
	has("gone", all, "!net7")

	// The command works on this process's namespace, where there is no bridge.
	r.refused([]string{"bridge nosuch"}, "interface", "add", "--bridge", "nosuch", id, "net1")
	hostEnd := hostEnd()
	r.ok("interface", "add", "--host-name", hostEnd, "--address", "10.80.0.2/24", "--address", "fd80::2/64", "--route", "10.81.0.0/16=10.80.0.1", "--mac", "02:00:00:00:80:02", id, "net1")
	out := r.exec(id, "sh", "-c", all)
	for _, want := range []string{"net1", "10.80.0.2/24", "fd80::2/64", "10.81.0.0/16 via 10.80.0.1", "02:00:00:00:80:02"} {
		if !strings.Contains(out, want) {
			t.Errorf("interface add: the pod lacks %q at once:\n%s", want, out)
		}
	}
	if l := r.interfaces(id)["net1"]; !l.Added || l.Card == nil || l.Kind != "veth" || !l.Up {
		t.Errorf("interface ls tells %+v", l)
	}
	if out := r.ok("interface", "ls", id); !strings.Contains(out, "CARD") || !strings.Contains(out, "2 of 2") {
		t.Errorf("the table is %q", out)
	}
	r.refused([]string{"net2", "no network card is left"}, "interface", "add", id, "net2")
	if out := r.sh("ip -o link"); strings.Count(out, hostEnd) != 1 {
		t.Errorf("interfaces of the host: %s", out)
	}
	r.ok("interface", "update", "--mtu", "1300", "--address", "10.80.0.3/24", "--remove-address", "10.80.0.2/24", id, "net1")
	if out := r.exec(id, "sh", "-c", all); !strings.Contains(out, "mtu 1300") || !strings.Contains(out, "10.80.0.3/24") || strings.Contains(out, "10.80.0.2/24") {
		t.Errorf("after interface update the pod has\n%s", out)
	}
	r.ok("interface", "update", "--route", "10.82.0.0/16=10.80.0.9", "--route", "10.83.0.0/16", "--mac", "02:00:00:00:80:03", id, "net1")
	if out := r.exec(id, "sh", "-c", all); !strings.Contains(out, "10.82.0.0/16 via 10.80.0.9") || !strings.Contains(out, "10.83.0.0/16 dev net1") || !strings.Contains(out, "02:00:00:00:80:03") {
		t.Errorf("after interface update the pod has\n%s", out)
	}
	r.ok("interface", "update", "--remove-route", "10.82.0.0/16=10.80.0.9", id, "net1")
	if out := r.exec(id, "ip", "route"); strings.Contains(out, "10.82.0.0") || !strings.Contains(out, "10.83.0.0/16 dev net1") {
		t.Errorf("after interface update --remove-route the pod has\n%s", out)
	}
	r.ok("interface", "update", "--down", id, "net1")
	if out := r.exec(id, "ip", "link", "show", "net1"); strings.Contains(out, "UP") || r.interfaces(id)["net1"].Up {
		t.Errorf("after interface update --down the pod has %s", out)
	}
	r.ok("interface", "update", "--up", id, "net1")
	if out := r.exec(id, "sh", "-c", all); !strings.Contains(out, "10.80.0.3/24") || !r.interfaces(id)["net1"].Up {
		t.Errorf("after interface update --up the pod has\n%s", out)
	}
	r.refused([]string{"--mtu", "68 to 65535"}, "interface", "update", "--mtu", "67", id, "net1")
	r.refused([]string{"--up and --down"}, "interface", "update", "--up", "--down", id, "net1")
	r.refused([]string{"nosuch"}, "interface", "update", "--up", id, "nosuch")
	r.refused([]string{"eth0", "was not added by runv"}, "interface", "rm", id, "eth0")
	r.ok("interface", "rm", id, "net1")
	if out := r.exec(id, "ip", "link"); strings.Contains(out, "net1") {
		t.Errorf("after interface rm the pod has\n%s", out)
	}
	// One that is left is taken away with the pod.
	r.ok("interface", "add", "--host-name", hostEnd, id, "net1")
	r.ok("delete", "--force", id)
	if after := w.look(ns); after != before {
		t.Errorf("the namespace was\n%s\nand is\n%s", before, after)
	}
	r.refused([]string{"does not exist"}, "interface", "ls", id)
}

// A prestart hook that brings the interface, as Docker has one; and too many.
func TestPodNetworkHook(t *testing.T) {
	vmOnly(t)
	r := newRT(t)
	w := r.wire()
	script := filepath.Join(r.dir, "hook")
	r.write(script, fmt.Sprintf(`pid=$(sed 's/.*"pid": *\([0-9]*\).*/\1/')
		exec 2>%s/hook.err
		set -ex
		i=0
		while [ $i -lt $1 ]; do
			ip -n %s link add hk$i type veth peer name eth$i
			ip -n %s link set eth$i netns $pid
			ip -n %s link set hk$i master br0 up
			nsenter -t $pid -n sh -ec "ip addr add 10.77.0.4$i/24 dev eth$i; ip link set eth$i up"
			i=$((i+1))
		done`, r.dir, w.host, w.host, w.host))
	hooked := func(n string) *specs.Spec {
		s := sh("ip -o addr; ping -c 1 -W 10 10.77.0.1")
		s.Hooks = &specs.Hooks{Prestart: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", script, n}, Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}}}} //nolint:staticcheck // what Docker uses
		caps := append([]string{"CAP_NET_RAW"}, defaultCaps...)
		s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
		return s
	}
	res := r.run(hooked("1"))
	if res.code != 0 || !strings.Contains(res.stdout, "10.77.0.40/24") || !strings.Contains(res.stdout, "0% packet loss") {
		text, _ := os.ReadFile(filepath.Join(r.dir, "hook.err"))
		t.Errorf("code %d, stdout %q, stderr %q; hook: %s", res.code, res.stdout, res.stderr, text)
	}
	waitFor(t, "the pod's interface to go", func() bool { return !strings.Contains(w.in(w.host, "ip link"), "hk0") })
	r.flags = append(r.flags, "--nics", "1")
	r.refused([]string{"eth1", "no network card is left for it", "has 1"}, "run", "--bundle", r.bundle(hooked("2")), r.name())
}
