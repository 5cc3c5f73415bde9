package client

import (
	"context"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
)

const noNetwork = "a container that has stopped has no network"

// Interfaces lists those of the network namespace of a container's pod, and says
// how many the pod can have.
func (c *Client) Interfaces(ctx context.Context, id string) (list []*supervisorv1.Interface, cards int, err error) {
	err = c.call(ctx, id, noNetwork, func(s *conn, _ *Container) error {
		resp, err := s.ListInterfaces(ctx, &supervisorv1.ListInterfacesRequest{Id: id})
		list, cards = resp.GetInterfaces(), int(resp.GetCards())
		return fromRPC(ctx, err)
	})
	return list, cards, err
}

// AddInterface gives the pod of container req.Id another one.
func (c *Client) AddInterface(ctx context.Context, req *supervisorv1.AddInterfaceRequest) error {
	return c.call(ctx, req.Id, noNetwork, func(s *conn, _ *Container) error {
		_, err := s.AddInterface(ctx, req)
		return fromRPC(ctx, err)
	})
}

// UpdateInterface changes one.
func (c *Client) UpdateInterface(ctx context.Context, req *supervisorv1.UpdateInterfaceRequest) error {
	return c.call(ctx, req.Id, noNetwork, func(s *conn, _ *Container) error {
		_, err := s.UpdateInterface(ctx, req)
		return fromRPC(ctx, err)
	})
}

// RemoveInterface takes one away that AddInterface has brought.
func (c *Client) RemoveInterface(ctx context.Context, id, name string) error {
	return c.call(ctx, id, noNetwork, func(s *conn, _ *Container) error {
		_, err := s.RemoveInterface(ctx, &supervisorv1.RemoveInterfaceRequest{Id: id, Name: name})
		return fromRPC(ctx, err)
	})
}
