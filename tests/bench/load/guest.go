package load

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Where runv's guest image lists its kernel modules (docs/guest-image.md): those
// that are always loaded, one file a line, and others, as "name: file file".
const (
	bootModules  = "/etc/runv/modules"
	laterModules = "/etc/runv/modules.later"
)

// guest is the init of a virtual machine that has runv's kernel and initrd, a
// network card, and nothing of runv that runs.
func guest(address, port string, out io.Writer) error {
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr(address)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(bootModules)
	if err != nil {
		return err
	}
	files := strings.Fields(string(text))
	if text, err = os.ReadFile(laterModules); err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, "virtio_net:"); ok {
			files = append(files, strings.Fields(rest)...)
		}
	}
	for _, f := range files {
		if err := loadModule("/" + f); err != nil {
			return err
		}
	}
	links, err := netlink.LinkList()
	if err != nil {
		return err
	}
	for _, l := range links {
		if l.Type() != "device" || l.Attrs().Name == "lo" {
			continue
		}
		if err := netlink.AddrAdd(l, addr); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return err
		}
		return serve(uint16(n), out)
	}
	return errors.New("there is no network card")
}

func loadModule(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	if errors.Is(err, unix.EKEYREJECTED) || errors.Is(err, unix.EPERM) {
		// The signature lies beside it.
		module, merr := os.ReadFile(file)
		sig, serr := os.ReadFile(file + ".sig")
		if err = errors.Join(merr, serr); err == nil {
			err = unix.InitModule(append(module, sig...), "")
		}
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load module %s: %w", file, err)
	}
	return nil
}
