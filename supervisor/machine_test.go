package supervisor

import (
	"context"
	"net"
	"slices"
	"testing"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/factory"
)

// warned is a factory that boots although something else was wished for.
type warned struct{ factory.Factory }

func (warned) Warning() string { return "it was booted" }

func TestWarningReachesTheCaller(t *testing.T) {
	p := newPod(t, func(p *pod) {
		p.s.o.Factory = func(context.Context, *supervisorv1.VM) (factory.Factory, string, error) {
			return warned{factory.Direct(p.driver)}, "fake", nil
		}
	})
	api, cl := p.dial()
	defer cl.Close()
	si := p.standIn("pod", "")
	resp, err := api.Create(t.Context(), p.request("pod", si, "sleep"))
	if err != nil || !slices.Equal(resp.Warnings, []string{"it was booted"}) {
		t.Errorf("%v, %v", resp, err)
	}
	// A further container boots nothing.
	if err := p.store.Reserve("web"); err != nil {
		t.Fatal(err)
	}
	si = p.standIn("web", "")
	resp, err = api.Create(t.Context(), p.request("web", si, "sleep"))
	if err != nil || len(resp.Warnings) != 0 {
		t.Errorf("%v, %v", resp, err)
	}
}

// Clones of one template have cards with one address until they are told
// another.
func TestMACAddress(t *testing.T) {
	seen := make(map[string]bool)
	for range 3 {
		p := newPod(t, nil)
		api, cl := p.dial()
		req := p.request("pod", p.standIn("pod", ""), "sleep")
		req.Vm.Network = "user"
		if _, err := api.Create(t.Context(), req); err != nil {
			t.Fatal(err)
		}
		cl.Close()
		n := p.agent.Sandbox().Network
		mac, err := net.ParseMAC(n.MacAddress)
		if err != nil || len(mac) != 6 || mac[0]&3 != 2 || n.Mode != agentv1.Network_MODE_DHCP {
			t.Errorf("the guest is told %v: %v", n, err)
		}
		if seen[n.MacAddress] {
			t.Errorf("%s twice", n.MacAddress)
		}
		seen[n.MacAddress] = true
	}
}
