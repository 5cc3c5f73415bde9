package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	"github.com/hyperhq/runv/trace"
)

// maxShares bounds the shares of a sandbox.
const maxShares = 64

var errConfigured = errors.New("the sandbox is configured already")

// running finds a container whose init process exists and has not ended.
func (a *Agent) running(id string) (*container, error) {
	c, err := a.container(id)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch c.state {
	case stateCreated, stateStarting, stateRunning:
		return c, nil
	case stateStopped:
		return nil, errNotRunning
	default:
		return nil, errNotFound
	}
}

// configure gives the guest its identity, once. If it fails, what was mounted
// is unmounted and it may be tried again.
func (a *Agent) configure(ctx context.Context, req *agentv1.ConfigureSandboxRequest) (err error) {
	if err := checkSandbox(req); err != nil {
		return err
	}
	a.configuring.Lock()
	defer a.configuring.Unlock()
	a.mu.Lock()
	configured, trials := a.configured, len(a.containers)
	a.mu.Unlock()
	switch {
	case configured:
		return errConfigured
	case trials > 0:
		return errTrials
	}
	// One phase after the other.
	end := trace.Begin(ctx, "wait for modules")
	phase := func(name string) {
		end()
		end = trace.Begin(ctx, name)
	}
	defer func() { end() }()
	if err := a.system.Ready(ctx); err != nil {
		return err
	}
	phase("names")
	defer func() {
		if err != nil {
			a.unmountShares(0)
		}
	}()
	hostname := req.Hostname
	if hostname == "" {
		hostname = req.SandboxId
	}
	// The limit of the kernel.
	if err := a.system.SetHostname(hostname[:min(len(hostname), 64)]); err != nil {
		return fmt.Errorf("set hostname %q: %w", hostname, err)
	}
	if err := a.system.SetMachineID(req.MachineId); err != nil {
		return fmt.Errorf("set machine id: %w", err)
	}
	phase("mount shares")
	if err := a.mountShares(req.Shares); err != nil {
		return err
	}
	phase("network")
	switch req.Network.GetMode() {
	case agentv1.Network_MODE_DHCP:
		// checkSandbox has read it.
		mac, _ := cardAddress(req.Network.GetMacAddress())
		if err := a.system.DHCP(ctx, mac); err != nil {
			return fmt.Errorf("configure network by dhcp: %w", err)
		}
	case agentv1.Network_MODE_NAMESPACE:
		if err := a.system.ConfigureNetwork(req.Network.GetConfig()); err != nil {
			return fmt.Errorf("configure network: %w", err)
		}
	default:
		if err := a.system.HideCards(); err != nil {
			return err
		}
	}
	a.networked = req.Network.GetMode() == agentv1.Network_MODE_NAMESPACE
	a.mu.Lock()
	defer a.mu.Unlock()
	a.configured, a.sandbox = true, req.SandboxId
	return nil
}

// mountedShare is a share of the host that is mounted.
type mountedShare struct {
	share *agentv1.Share
	undo  func()
}

// mountShares mounts those that are not yet mounted, and unmounts what is not
// among them. After an error there are none but those of before.
func (a *Agent) mountShares(shares []*agentv1.Share) (err error) {
	before := len(a.shares)
	same := before <= len(shares) && !slices.ContainsFunc(shares[:before], func(s *agentv1.Share) bool {
		return !slices.ContainsFunc(a.shares, func(m *mountedShare) bool { return proto.Equal(m.share, s) })
	})
	if !same {
		a.unmountShares(0)
		before = 0
	}
	for _, s := range shares[before:] {
		undo, err := a.system.MountShare(s)
		if err != nil {
			a.unmountShares(before)
			return fmt.Errorf("mount share %q: %w", s.Tag, err)
		}
		a.shares = append(a.shares, &mountedShare{s, undo})
	}
	return nil
}

// cachedShare is mounted for what nobody changes.
var cachedShare = &agentv1.Share{Tag: agentv1.CachedShareTag, Type: "9p", Options: "cache=loose", ReadOnly: true}

// mountCached mounts it when a container is the first to need it, for the rest of
// the guest's life.
func (a *Agent) mountCached(req *agentv1.CreateContainerRequest) error {
	needed := req.GetRootfs().GetShareTag() == agentv1.CachedShareTag ||
		slices.ContainsFunc(req.GetMounts(), func(m *agentv1.Mount) bool { return m.GetShareTag() == agentv1.CachedShareTag })
	if !needed {
		return nil
	}
	a.configuring.Lock()
	defer a.configuring.Unlock()
	if a.cachedMounted {
		return nil
	}
	if _, err := a.system.MountShare(cachedShare); err != nil {
		return fmt.Errorf("mount share %q: %w", cachedShare.Tag, err)
	}
	a.cachedMounted = true
	return nil
}

// unmountShares leaves the first keep shares.
func (a *Agent) unmountShares(keep int) {
	for _, m := range slices.Backward(a.shares[keep:]) {
		m.undo()
	}
	a.shares = a.shares[:keep]
}

// checkSandbox reports the first field that cannot be right.
func checkSandbox(req *agentv1.ConfigureSandboxRequest) error {
	if req.SandboxId == "" {
		return invalid("sandbox_id is empty")
	}
	if id := req.MachineId; id != "" && (len(id) != 32 || strings.Trim(id, "0123456789abcdef") != "") {
		return invalid(fmt.Sprintf("machine_id is %q, want 32 lower-case hex digits", id))
	}
	if err := checkShares(req.Shares); err != nil {
		return err
	}
	switch m := req.Network.GetMode(); m {
	case agentv1.Network_MODE_UNSPECIFIED, agentv1.Network_MODE_NONE, agentv1.Network_MODE_DHCP:
	case agentv1.Network_MODE_NAMESPACE:
		if err := checkNetwork(req.Network.Config); err != nil {
			return err
		}
	default:
		return invalid(fmt.Sprintf("network.mode is %d", m))
	}
	if _, err := cardAddress(req.Network.GetMacAddress()); err != nil {
		return invalid(fmt.Sprintf("network.mac_address: %v", err))
	}
	return nil
}

// checkShares reports the first share that cannot be right.
func checkShares(shares []*agentv1.Share) error {
	if len(shares) > maxShares {
		return invalid(fmt.Sprintf("%d shares, want at most %d", len(shares), maxShares))
	}
	for i, s := range shares {
		switch {
		case s.Tag == "" || len(s.Tag) > 31 || s.Tag == "." || s.Tag == ".." || strings.ContainsAny(s.Tag, "/\x00"):
			return invalid(fmt.Sprintf("shares[%d].tag is %q, want 1 to 31 bytes that are one path element", i, s.Tag))
		case s.Type != "9p" && s.Type != "virtiofs":
			return invalid(fmt.Sprintf("shares[%d].type is %q, want 9p or virtiofs", i, s.Type))
		case strings.ContainsRune(s.Options, 0) || len(s.Options) > 1024:
			return invalid(fmt.Sprintf("shares[%d].options is not at most 1024 bytes of text", i))
		}
	}
	return nil
}
