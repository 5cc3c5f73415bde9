package supervisor

import (
	"context"
	"errors"
	"net"
	"net/netip"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/network"
)

// withNetwork calls f with the pod's network, if it has one, in a call that the
// end of the pod waits for.
func (s *Supervisor) withNetwork(ctx context.Context, id string, f func(context.Context, *podNetwork) error) error {
	if _, err := s.find(id); err != nil {
		return err
	}
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return err
	}
	defer done()
	s.mu.Lock()
	var n *podNetwork
	if s.machine != nil && s.committed {
		n = s.machine.network
	}
	s.mu.Unlock()
	if n == nil {
		return errNoNamespace
	}
	return refused(f(ctx, n))
}

// refused gives errors about what was asked for their code.
func refused(err error) error {
	switch {
	case errors.Is(err, network.ErrInvalid):
		return status.Error(codes.InvalidArgument, err.Error())
	case errors.Is(err, network.ErrNoCard):
		return status.Error(codes.FailedPrecondition, err.Error())
	}
	return err
}

// ListInterfaces implements the API.
func (v *service) ListInterfaces(ctx context.Context, req *supervisorv1.ListInterfacesRequest) (*supervisorv1.ListInterfacesResponse, error) {
	resp := new(supervisorv1.ListInterfacesResponse)
	return answer(resp, v.s.withNetwork(ctx, req.Id, func(_ context.Context, n *podNetwork) error {
		list, err := n.ns.Status()
		if err != nil {
			return err
		}
		resp.Cards = uint32(n.ns.Cards())
		for _, i := range list {
			o := &supervisorv1.Interface{
				Name: i.Name, Kind: i.Kind, Mac: i.MAC.String(), Mtu: uint32(i.MTU), Up: i.Up,
				Card: int32(i.Slot), Problem: i.Problem, Added: i.Added,
			}
			for _, a := range i.Addresses {
				o.Addresses = append(o.Addresses, a.Prefix.String())
			}
			resp.Interfaces = append(resp.Interfaces, o)
		}
		return nil
	}))
}

// AddInterface implements the API.
func (v *service) AddInterface(ctx context.Context, req *supervisorv1.AddInterfaceRequest) (*supervisorv1.AddInterfaceResponse, error) {
	spec := network.Spec{Name: req.Name, MTU: int(req.Mtu), Bridge: req.Bridge, Device: req.Device, HostName: req.HostName}
	var p parser
	spec.MAC, spec.Addresses, spec.Routes = p.mac(req.Mac), p.prefixes(req.Addresses), p.routes(req.Routes)
	if p.err != nil {
		return answer[supervisorv1.AddInterfaceResponse](nil, refused(p.err))
	}
	return answer(&supervisorv1.AddInterfaceResponse{}, v.s.withNetwork(ctx, req.Id, func(ctx context.Context, n *podNetwork) error {
		if err := n.ns.Add(spec); err != nil {
			return err
		}
		err := n.update(ctx)
		if err != nil {
			// The pod does not have it: then it is nowhere.
			err = errors.Join(err, n.ns.Remove(spec.Name))
			_ = n.update(ctx)
		}
		return err
	}))
}

// UpdateInterface implements the API.
func (v *service) UpdateInterface(ctx context.Context, req *supervisorv1.UpdateInterfaceRequest) (*supervisorv1.UpdateInterfaceResponse, error) {
	e := network.Edit{MTU: int(req.Mtu), Up: req.Up}
	var p parser
	e.MAC, e.AddAddresses, e.RemoveAddresses = p.mac(req.Mac), p.prefixes(req.AddAddresses), p.prefixes(req.RemoveAddresses)
	e.AddRoutes, e.RemoveRoutes = p.routes(req.AddRoutes), p.routes(req.RemoveRoutes)
	if p.err != nil {
		return answer[supervisorv1.UpdateInterfaceResponse](nil, refused(p.err))
	}
	return answer(&supervisorv1.UpdateInterfaceResponse{}, v.s.withNetwork(ctx, req.Id, func(ctx context.Context, n *podNetwork) error {
		return errors.Join(n.ns.Change(req.Name, e), n.update(ctx))
	}))
}

// RemoveInterface implements the API.
func (v *service) RemoveInterface(ctx context.Context, req *supervisorv1.RemoveInterfaceRequest) (*supervisorv1.RemoveInterfaceResponse, error) {
	return answer(&supervisorv1.RemoveInterfaceResponse{}, v.s.withNetwork(ctx, req.Id, func(ctx context.Context, n *podNetwork) error {
		if err := n.ns.Remove(req.Name); err != nil {
			return err
		}
		return n.update(ctx)
	}))
}

// parser keeps the first error.
type parser struct{ err error }

func (p *parser) mac(s string) net.HardwareAddr {
	if s == "" || p.err != nil {
		return nil
	}
	mac, err := net.ParseMAC(s)
	if err != nil {
		p.err = invalid("hardware address %q: %v", s, err)
	}
	return mac
}

func (p *parser) prefixes(list []string) (out []netip.Prefix) {
	for _, s := range list {
		a, err := netip.ParsePrefix(s)
		if err != nil && p.err == nil {
			p.err = invalid("address %q: want one with a prefix length, such as 10.0.0.2/24", s)
		}
		out = append(out, a)
	}
	return out
}

func (p *parser) routes(list []string) (out []network.Via) {
	for _, s := range list {
		v, err := network.ParseVia(s)
		if err != nil && p.err == nil {
			p.err = err
		}
		out = append(out, v)
	}
	return out
}
