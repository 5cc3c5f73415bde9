package qemu

import (
	"errors"
	"flag"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hyperhq/runv/hypervisor"
)

var update = flag.Bool("update", false, "write the golden files")

func base() hypervisor.Config {
	return hypervisor.Config{
		Name: "pod", VCPUs: 2, MemoryMiB: 512,
		Kernel: "/var/lib/runv/kernel", Initrd: "/var/lib/runv/initrd.img",
		SerialPort: "runv.agent",
	}
}

func TestArgs(t *testing.T) {
	full := base()
	full.Name = "a,b=c"
	full.KernelParams = "debug init=/x,y"
	full.Confine = true
	full.Shares = []hypervisor.Share{
		{Tag: "runv", Path: "/run/runv/a,b/share"},
		{Tag: "ro,x", Path: "/srv", ReadOnly: true},
	}
	full.NICs = []hypervisor.NIC{
		{User: true},
		{MAC: net.HardwareAddr{0x52, 0x54, 0, 1, 2, 3}},
	}
	vsock := base()
	vsock.Transport, vsock.CID, vsock.VsockPort = hypervisor.TransportVsock, 77, 1024
	q35 := full
	q35.Machine = "q35"
	virtiofs := base()
	virtiofs.Shares = []hypervisor.Share{{Tag: "runv,x", Path: "/srv", Server: os.Stdin}, {Tag: "plain", Path: "/a"}, {Tag: "b", Path: "/b", Server: os.Stdin}}
	pciVirtiofs := virtiofs
	pciVirtiofs.Machine = "q35"
	taps := base()
	taps.NICs = []hypervisor.NIC{{Tap: os.Stdin}, {}, {Tap: os.Stdin}}

	for _, test := range []struct {
		golden string
		config hypervisor.Config
		arch   string
		accel  Accel
	}{
		{"amd64-microvm-tcg", base(), "amd64", TCG},
		{"amd64-microvm-kvm", base(), "amd64", KVM},
		{"amd64-microvm-full", full, "amd64", TCG},
		{"amd64-microvm-vsock", vsock, "amd64", KVM},
		{"amd64-q35-full", q35, "amd64", KVM},
		{"amd64-microvm-taps", taps, "amd64", KVM},
		{"amd64-microvm-virtiofs", virtiofs, "amd64", TCG},
		{"amd64-q35-virtiofs", pciVirtiofs, "amd64", KVM},
		{"arm64-virt-virtiofs", virtiofs, "arm64", KVM},
		{"arm64-virt-tcg", base(), "arm64", TCG},
		{"arm64-virt-full", full, "arm64", KVM},
	} {
		t.Run(test.golden, func(t *testing.T) {
			args, err := Args(test.config, ArgsOptions{
				Arch: test.arch, Accel: test.accel,
				QMPFD: 3, ConsoleFD: 4, LifelineFD: 5, AgentFD: 6, VhostFD: 6, TapFDs: []int{7, 9}, VhostNetFDs: []int{8, 10}, ShareFDs: []int{11, 12}, TSCKHz: 2600000,
			})
			if err != nil {
				t.Fatal(err)
			}
			got := pretty(args)
			path := filepath.Join("testdata", test.golden+".args")
			if *update {
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("arguments differ from %s (go test -update writes it):\n%s", path, got)
			}
		})
	}
}

// pretty puts every option on a line of its own.
func pretty(args []string) string {
	var b strings.Builder
	for i, a := range args {
		if i > 0 {
			b.WriteString(map[bool]string{true: "\n", false: " "}[strings.HasPrefix(a, "-")])
		}
		b.WriteString(a)
	}
	return b.String() + "\n"
}

func TestArgsRefuses(t *testing.T) {
	options := ArgsOptions{Arch: "amd64", Accel: TCG}
	for name, test := range map[string]struct {
		change  func(*hypervisor.Config, *ArgsOptions)
		want    string
		unknown bool
	}{
		"config":       {change: func(c *hypervisor.Config, _ *ArgsOptions) { c.VCPUs = 0 }, want: "vcpus"},
		"machine":      {change: func(c *hypervisor.Config, _ *ArgsOptions) { c.Machine = "vax" }, want: "want one of microvm, q35", unknown: true},
		"architecture": {change: func(_ *hypervisor.Config, o *ArgsOptions) { o.Arch = "vax" }, want: "architecture", unknown: true},
		"accelerator":  {change: func(_ *hypervisor.Config, o *ArgsOptions) { o.Accel = "xen" }, want: "accelerator", unknown: true},
		"serial port":  {change: func(c *hypervisor.Config, _ *ArgsOptions) { c.SerialPort = "" }, want: "serial port"},
		"no descriptor": {change: func(c *hypervisor.Config, _ *ArgsOptions) {
			c.NICs = []hypervisor.NIC{{Tap: os.Stdin}}
		}, want: "nics[0] has a tap"},
		"no server": {change: func(c *hypervisor.Config, _ *ArgsOptions) {
			c.Shares = []hypervisor.Share{{Tag: "a", Path: "/a", Server: os.Stdin}}
		}, want: "shares[0] has a server"},
		"read-only server": {change: func(c *hypervisor.Config, _ *ArgsOptions) {
			c.Shares = []hypervisor.Share{{Tag: "a", Path: "/a", ReadOnly: true, Server: os.Stdin}}
		}, want: "shares[0] is read-only and has a server"},
		"two peers": {change: func(c *hypervisor.Config, _ *ArgsOptions) {
			c.NICs = []hypervisor.NIC{{Tap: os.Stdin, User: true}}
		}, want: "nics[0] has two peers"},
		"multicast": {change: func(c *hypervisor.Config, _ *ArgsOptions) {
			c.NICs = []hypervisor.NIC{{MAC: net.HardwareAddr{1, 0, 0, 0, 0, 0}}}
		}, want: "nics[0].mac"},
		"short mac": {change: func(c *hypervisor.Config, _ *ArgsOptions) { c.NICs = []hypervisor.NIC{{MAC: net.HardwareAddr{2}}} }, want: "nics[0].mac"},
		"newline":   {change: func(c *hypervisor.Config, _ *ArgsOptions) { c.Name = "a\nb" }, want: "name"},
		"zero byte": {change: func(c *hypervisor.Config, _ *ArgsOptions) {
			c.Shares = []hypervisor.Share{{Tag: "a", Path: "/a\x00"}}
		}, want: "shares[0].path"},
		"long parameters": {change: func(c *hypervisor.Config, _ *ArgsOptions) { c.KernelParams = strings.Repeat("x", 2048) }, want: "kernel parameters"},
	} {
		t.Run(name, func(t *testing.T) {
			c, o := base(), options
			test.change(&c, &o)
			_, err := Args(c, o)
			if err == nil || !strings.Contains(err.Error(), test.want) || errors.Is(err, hypervisor.ErrUnsupported) != test.unknown {
				t.Errorf("error is %v, want one about %q", err, test.want)
			}
		})
	}
}

func TestEscape(t *testing.T) {
	for in, want := range map[string]string{
		"":          "",
		"plain":     "plain",
		"a,b":       "a,,b",
		",,":        ",,,,",
		"k=v,id=x":  "k=v,,id=x",
		"päth/ü,,ö": "päth/ü,,,,ö",
	} {
		if got := escape(in); got != want {
			t.Errorf("escape(%q) is %q, want %q", in, got, want)
		}
	}
}

// unescape reads one value as QEMU does (get_opt_value): up to a single comma.
func unescape(s string) (value, rest string) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == ',' {
			if i+1 == len(s) || s[i+1] != ',' {
				return b.String(), s[i:]
			}
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String(), ""
}

// FuzzEscape: QEMU reads back what went in, and nothing is left over.
func FuzzEscape(f *testing.F) {
	f.Add("a,b")
	f.Add(",,,")
	f.Fuzz(func(t *testing.T, s string) {
		if got, rest := unescape(escape(s)); got != s || rest != "" {
			t.Errorf("%q became %q and %q", s, got, rest)
		}
	})
}

func TestDeriveMAC(t *testing.T) {
	seen := map[string]bool{}
	for _, name := range []string{"a", "b"} {
		for i := range 3 {
			mac := deriveMAC(name, i)
			if mac[0]&3 != 2 || seen[mac.String()] {
				t.Errorf("MAC %d of %s is %s", i, name, mac)
			}
			seen[mac.String()] = true
		}
	}
	if mac := deriveMAC("a", 0).String(); !seen[mac] {
		t.Errorf("a MAC is not the same twice: %s", mac)
	}
}
