package guestimage

import (
	"bufio"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// bootModules are loaded by the agent when it starts, in this order: what every
// pod needs. Each costs boot time, in proportion to its size; the agent's way to
// the host comes first, and the rest is loaded while they talk.
var bootModules = []string{
	"virtio_mmio",        // every device of the microvm machine
	"virtio_console",     // the agent's port
	"9pnet_virtio", "9p", // the pod's share
}

// laterModules are in the initrd for when a container, or the pod's
// configuration, needs them. Every megabyte costs 8 ms of each boot when
// instructions are emulated, so large ones need a good reason.
var laterModules = []string{
	// File systems: of shares, of images, in containers.
	"virtiofs", "fuse", "overlay", "ext4", "erofs", "squashfs",
	// Devices. The agent loads the drivers of those that the machine has.
	"vmw_vsock_virtio_transport", "virtio_net", "virtio_rng",
	"virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "loop", "tun",
	// Networks inside a pod.
	"veth", "bridge", "br_netfilter", "dummy", "macvlan", "ipvlan", "vxlan", "wireguard", "af_packet",
	// Packet filters: nftables, and iptables in both its forms.
	"nf_tables", "nft_ct", "nft_nat", "nft_chain_nat", "nft_masq", "nft_redir", "nft_reject",
	"nft_reject_inet", "nft_reject_ipv4", "nft_reject_ipv6", "nft_limit", "nft_log", "nft_numgen",
	"nft_hash", "nft_fib", "nft_fib_inet", "nft_fib_ipv4", "nft_fib_ipv6", "nft_compat", "nft_objref",
	"nf_conntrack", "nf_conntrack_netlink", "nf_nat",
	"ip_tables", "iptable_filter", "iptable_nat", "iptable_mangle", "iptable_raw",
	"ip6_tables", "ip6table_filter", "ip6table_nat", "ip6table_mangle", "ip6table_raw",
	"ipt_REJECT", "ip6t_REJECT",
	"xt_conntrack", "xt_MASQUERADE", "xt_addrtype", "xt_comment", "xt_mark", "xt_connmark", "xt_multiport",
	"xt_nat", "xt_REDIRECT", "xt_tcpudp", "xt_limit", "xt_owner", "xt_statistic", "xt_state",
	// Traffic control.
	"sch_ingress", "sch_fq", "sch_fq_codel", "sch_htb", "sch_tbf", "sch_netem", "cls_u32", "act_mirred",
	// What else containers are known to use.
	"binfmt_misc",
}

// requiredModules are those without which a guest cannot run a container; each
// must be among the modules or built in.
var requiredModules = []string{"virtio_mmio", "virtio_console", "9p", "9pnet_virtio", "overlay"}

// alsoNeeded names modules that another one asks the kernel for by an alias
// while it starts. There is no modprobe in the guest, so they go before it.
var alsoNeeded = map[string][]string{
	"libcrc32c": {"crc32c_generic"},
	"ext4":      {"crc32c_generic"},
}

// module is one file of the tree.
type module struct {
	name  string // with underscores, as /proc/modules has it
	path  string // relative to the initrd's root: lib/modules/VERSION/kernel/…/x.ko
	data  []byte // uncompressed, without its signature
	sig   []byte // its signature as it was at the end; empty: it has none
	deps  []string
	alias []string
}

// moduleSet is what goes into an initrd.
type moduleSet struct {
	boot  []*module   // in load order
	later [][]*module // each: its dependencies in load order, then itself
	files []*module   // every file once, by path
}

func (s moduleSet) names() (boot, later []string) {
	boot, later = []string{}, []string{}
	for _, m := range s.boot {
		boot = append(boot, m.name)
	}
	for _, l := range s.later {
		later = append(later, l[len(l)-1].name)
	}
	return boot, later
}

// tree is a directory of modules, such as /lib/modules/6.1.0-56-amd64.
type tree struct {
	dir     string
	version string
	files   map[string]string // name → file below dir
	builtin map[string]bool
	read    map[string]*module
}

// canonical is a module's name as the kernel reports it, from a file name or a
// spelling with dashes.
func canonical(name string) string {
	base := filepath.Base(name)
	if i := strings.Index(base, ".ko"); i >= 0 {
		base = base[:i]
	}
	return strings.ReplaceAll(base, "-", "_")
}

// openTree lists the modules below dir. It reads none of them.
func openTree(dir, version string) (*tree, error) {
	t := &tree{dir: dir, version: version, files: map[string]string{}, builtin: map[string]bool{}, read: map[string]*module{}}
	b, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, fmt.Errorf("read list of built-in modules: %w", err)
	}
	for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
		if l := strings.TrimSpace(s.Text()); l != "" {
			t.builtin[canonical(l)] = true
		}
	}
	err = filepath.WalkDir(filepath.Join(dir, "kernel"), func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if !d.Type().IsRegular() {
			return nil
		}
		switch name := d.Name(); {
		case strings.HasSuffix(name, ".ko"), strings.HasSuffix(name, ".ko.xz"),
			strings.HasSuffix(name, ".ko.zst"), strings.HasSuffix(name, ".ko.gz"):
			rel, err := filepath.Rel(dir, p)
			if err != nil {
				return err
			}
			t.files[canonical(name)] = rel
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list modules: %w", err)
	}
	return t, nil
}

// has tells whether name is a module or built in.
func (t *tree) has(name string) bool {
	return t.builtin[name] || t.files[name] != ""
}

// load reads a module and what it says about itself. The dependencies come from
// the module, not from modules.dep: a package that was only unpacked has none.
func (t *tree) load(name string) (*module, error) {
	if m := t.read[name]; m != nil {
		return m, nil
	}
	rel := t.files[name]
	file := filepath.Join(t.dir, rel)
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read module: %w", err)
	}
	if !strings.HasSuffix(rel, ".ko") {
		if data, err = decompress(data); err != nil {
			return nil, fmt.Errorf("read module %s: %w", file, err)
		}
		rel = rel[:strings.LastIndex(rel, ".ko")+len(".ko")]
	}
	info, err := modinfo(data)
	if err != nil {
		return nil, fmt.Errorf("read module %s: %w", file, err)
	}
	data, sig := splitSignature(data)
	m := &module{name: name, data: data, sig: sig, path: "lib/modules/" + t.version + "/" + filepath.ToSlash(rel), alias: info["alias"]}
	if v := info["vermagic"]; len(v) != 1 || firstWord(v[0]) != t.version {
		return nil, fmt.Errorf("read module %s: it is for kernel %q, want %q", file, firstWord(strings.Join(v, " ")), t.version)
	}
	for _, d := range info["depends"] {
		for n := range strings.SplitSeq(d, ",") {
			if n != "" {
				m.deps = append(m.deps, canonical(n))
			}
		}
	}
	t.read[name] = m
	return m, nil
}

// closure appends name's dependencies in load order and then name to out,
// leaving out what is built in or in out already.
func (t *tree) closure(out []*module, name string) ([]*module, error) {
	return t.visit(out, name, nil)
}

func (t *tree) visit(out []*module, name string, path []string) ([]*module, error) {
	if t.files[name] == "" {
		if t.builtin[name] {
			return out, nil
		}
		return nil, fmt.Errorf("module %s: not in %s (needed by %s)", name, t.dir, strings.Join(path, " < "))
	}
	if slices.ContainsFunc(out, func(m *module) bool { return m.name == name }) {
		return out, nil
	}
	if slices.Contains(path, name) {
		return nil, fmt.Errorf("module %s: it depends on itself: %s", name, strings.Join(append(path, name), " < "))
	}
	m, err := t.load(name)
	if err != nil {
		return nil, err
	}
	path = append(path, name)
	for _, d := range alsoNeeded[name] {
		if t.files[d] != "" {
			if out, err = t.visit(out, d, path); err != nil {
				return nil, err
			}
		}
	}
	for _, d := range m.deps {
		if out, err = t.visit(out, d, path); err != nil {
			return nil, err
		}
	}
	return append(out, m), nil
}

// missing returns the required modules that the tree lacks.
func (t *tree) missing() []string {
	var out []string
	for _, n := range requiredModules {
		if !t.has(n) {
			out = append(out, n)
		}
	}
	return out
}

// collect reads from dir what an initrd for the kernel version needs.
func collect(dir, version string) (moduleSet, error) {
	t, err := openTree(dir, version)
	if err != nil {
		return moduleSet{}, err
	}
	if m := t.missing(); len(m) > 0 {
		return moduleSet{}, fmt.Errorf("modules in %s: %s missing, neither modules nor built in", dir, strings.Join(m, ", "))
	}
	var s moduleSet
	for _, n := range bootModules {
		if t.files[n] == "" {
			continue // built in, or not made for this kernel and not required
		}
		if s.boot, err = t.closure(s.boot, n); err != nil {
			return moduleSet{}, err
		}
	}
	for _, n := range laterModules {
		if t.files[n] == "" {
			continue
		}
		l, err := t.closure(nil, n)
		if err != nil {
			return moduleSet{}, err
		}
		s.later = append(s.later, l)
	}
	slices.SortFunc(s.later, func(a, b []*module) int {
		return strings.Compare(a[len(a)-1].name, b[len(b)-1].name)
	})
	for _, m := range t.read {
		s.files = append(s.files, m)
	}
	slices.SortFunc(s.files, func(a, b *module) int { return strings.Compare(a.path, b.path) })
	return s, nil
}

// modinfo returns the key=value strings of a module's .modinfo section.
func modinfo(data []byte) (map[string][]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	sec := f.Section(".modinfo")
	if sec == nil {
		return nil, errors.New("no .modinfo section")
	}
	b, err := sec.Data()
	if err != nil {
		return nil, fmt.Errorf("read .modinfo: %w", err)
	}
	info := map[string][]string{}
	for s := range strings.SplitSeq(string(b), "\x00") {
		if k, v, ok := strings.Cut(s, "="); ok {
			info[k] = append(info[k], v)
		}
	}
	return info, nil
}

func firstWord(s string) string {
	w, _, _ := strings.Cut(s, " ")
	return w
}
