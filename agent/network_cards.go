package agent

import (
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

const (
	virtioBus = "/sys/bus/virtio"
	// cardDriver is the driver of the VM's network cards, as a module and in sysfs.
	cardDriver = "virtio_net"
	// cardDevice is the virtio device type of a network card, as sysfs shows it.
	cardDevice = "0x0001"
)

// cards are the network cards of the VM. Each exists from its start and has no
// interface in the guest until it is plugged, that is, given to its driver.
// Their devices are in no particular order; the address with which a card begins
// tells which one it is, and can only be read once it is plugged.
type cards struct {
	bus     string // directory of sysfs
	devices map[int]string
	// early is done when those are hidden that the kernel has plugged by itself.
	early sync.WaitGroup
}

// loadCardDriver loads the cards' driver without letting it take any card.
func (g *Guest) loadCardDriver() error {
	if _, err := os.Stat(filepath.Join(virtioBus, "drivers", cardDriver)); err == nil {
		return nil
	}
	probe := filepath.Join(virtioBus, "drivers_autoprobe")
	if err := os.WriteFile(probe, []byte("0"), 0); err != nil {
		return fmt.Errorf("keep cards from their driver: %w", err)
	}
	err := g.modules.load(cardDriver)
	return errors.Join(err, os.WriteFile(probe, []byte("1"), 0))
}

// list returns the devices that are network cards, in the order of their names.
func (c *cards) list() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(c.bus, "devices"))
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(c.bus, "devices", e.Name(), "device"))
		if err == nil && strings.TrimSpace(string(b)) == cardDevice {
			names = append(names, e.Name())
		}
	}
	slices.SortFunc(names, func(a, b string) int { return number(a) - number(b) })
	return names, nil
}

// number is the n of virtion.
func number(device string) int {
	n, _ := strconv.Atoi(strings.TrimPrefix(device, "virtio"))
	return n
}

// plugged is the name of a device's interface, empty if it has none.
func (c *cards) plugged(device string) string {
	entries, err := os.ReadDir(filepath.Join(c.bus, "devices", device, "net"))
	if err != nil || len(entries) == 0 {
		return ""
	}
	return entries[0].Name()
}

// plug gives a device to its driver and returns the name of its interface.
func (c *cards) plug(device string) (string, error) {
	if name := c.plugged(device); name != "" {
		return name, nil
	}
	if err := os.WriteFile(filepath.Join(c.bus, "drivers", cardDriver, "bind"), []byte(device), 0); err != nil {
		return "", fmt.Errorf("give card %s to its driver: %w", device, err)
	}
	name := c.plugged(device)
	if name == "" {
		return "", fmt.Errorf("card %s has no interface", device)
	}
	return name, nil
}

// unplug takes a device from its driver; its interface is gone then.
func (c *cards) unplug(device string) error {
	if c.plugged(device) == "" {
		return nil
	}
	if err := os.WriteFile(filepath.Join(c.bus, "drivers", cardDriver, "unbind"), []byte(device), 0); err != nil {
		return fmt.Errorf("take card %s from its driver: %w", device, err)
	}
	return nil
}

// take plugs the card with a number and returns the name of its interface.
func (c *cards) take(slot int) (string, error) {
	if d := c.devices[slot]; d != "" {
		return c.plug(d)
	}
	list, err := c.list()
	if err != nil {
		return "", fmt.Errorf("list network cards: %w", err)
	}
	// Most likely they are in the order of their numbers, or the other way round.
	if slot < len(list) {
		list = append([]string{list[slot], list[len(list)-1-slot]}, list...)
	}
	for _, d := range list {
		if known(c.devices, d) {
			continue
		}
		name, err := c.plug(d)
		if err != nil {
			return "", err
		}
		b, err := os.ReadFile(filepath.Join(c.bus, "devices", d, "net", name, "address"))
		if err != nil {
			return "", fmt.Errorf("card %s: %w", d, err)
		}
		if n, ok := cardNumber(strings.TrimSpace(string(b))); ok {
			c.devices[n] = d
			if n == slot {
				return name, nil
			}
		}
		if err := c.unplug(d); err != nil {
			return "", err
		}
	}
	return "", fmt.Errorf("card %d: %w", slot, errNoCard)
}

func known(devices map[int]string, device string) bool {
	for _, d := range devices {
		if d == device {
			return true
		}
	}
	return false
}

// cardNumber reads an address as sysfs shows it.
func cardNumber(address string) (int, bool) {
	mac, err := cardAddress(address)
	if err != nil || len(mac) != macLen || string(mac[:macLen-1]) != agentv1.CardPrefix {
		return 0, false
	}
	return int(mac[macLen-1]), true
}

// hideEarly begins to hide the cards of a kernel that has their driver built in,
// which has plugged them all by now. Until an interface is gone its memory has to
// be let go of by everybody, for which the kernel waits several ticks.
func (c *cards) hideEarly(log *log.Logger) {
	if _, err := os.Stat(filepath.Join(c.bus, "drivers", cardDriver)); err != nil {
		return
	}
	c.early.Go(func() {
		if err := c.unplugAll(); err != nil {
			log.Printf("hide network cards: %v", err) // hide tries again
		}
	})
}

// hide unplugs every card. It comes before all else that is done with them.
func (c *cards) hide() error {
	c.early.Wait()
	return c.unplugAll()
}

// unplugAll unplugs all cards at once: what takes time is the same wait for each.
func (c *cards) unplugAll() error {
	list, err := c.list()
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	list = slices.DeleteFunc(list, func(d string) bool { return c.plugged(d) == "" })
	errs := make([]error, len(list))
	var wg sync.WaitGroup
	for i, d := range list {
		wg.Go(func() { errs[i] = c.unplug(d) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// userCard plugs the card of the hypervisor's own network stack, which is the
// first, and hides the others. One whose number is not known is that of a VM
// with a single card.
func (g *Guest) userCard() (netlink.Link, error) {
	if err := g.loadCardDriver(); err != nil && !errors.Is(err, errNoModule) {
		return nil, err
	}
	if err := g.cards.hide(); err != nil {
		return nil, err
	}
	name, err := g.cards.take(0)
	if errors.Is(err, errNoCard) {
		list, lerr := g.cards.list()
		if lerr != nil || len(list) != 1 {
			return nil, err
		}
		name, err = g.cards.plug(list[0])
	}
	if err != nil {
		return nil, err
	}
	return netlink.LinkByName(name)
}
