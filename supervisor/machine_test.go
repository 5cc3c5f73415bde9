package supervisor

import (
	"context"
	"slices"
	"testing"

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
